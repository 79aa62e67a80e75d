#!/usr/bin/env bash
# Linters and tests on the CPU, with all their set-up.
#
#   ./launch/test.sh [--slow] [arguments of pytest]
#
# --slow also runs the tests marked slow. The environment: see setup_venv.sh.
set -euo pipefail
# shellcheck source=launch/setup_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"

failed=()

# Runs the command after the name $1 under a heading; notes it when it fails.
section() {
  local name="$1"
  shift
  printf '\n== %s (%d s)\n' "$name" "$SECONDS"
  "$@" || failed+=("$name")
}

ensure_venv test
cd "$ROOT"
export JAX_PLATFORMS=cpu
# Most of the time goes into compiling many tiny programs: keep all of them.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$VENV/jax_cache}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

section 'ruff' "$VENV_PYTHON" -m ruff check .
section 'pyink' "$VENV_PYTHON" -m pyink --check .
section 'pytest' "$VENV_PYTHON" -m pytest \
  -n logical --maxprocesses 4 --dist loadfile --durations 10 "$@"

printf '\n== '
if ((${#failed[@]})); then
  printf 'failed: %s (%d s)\n' "${failed[*]}" "$SECONDS"
  exit 1
fi
printf 'passed (%d s)\n' "$SECONDS"
