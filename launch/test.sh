#!/usr/bin/env bash
# usage: ./launch/test.sh [flags] [arguments of pytest]
#
# Makes the virtual environment and runs the linters and the tests on the CPU.
#
# flags:
#   --slow        Also runs the tests that take minutes. Default: off.
#   --newest      Runs the tests, and one `plan`, with the newest jax, flax,
#                 orbax, transformers and datasets that setup.py allows, on the
#                 newest Python found, in the folder .venv-newest. No linters.
#                 Default: off.
#   -h, --help    Prints this text.
#
# Variables: PYTHON is the interpreter to make the environment with (default:
# the first that fits on PATH), MA_RLHF_VENV its folder (default: .venv).
#
# Exit codes: 0 all passed; 1 something failed, which the last line names.
#
# examples:
#   ./launch/test.sh --slow
#   ./launch/test.sh tests/masking_test.py -k whiten
set -euo pipefail
# shellcheck source=launch/setup_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_venv.sh"
answer_help "$@"

# Prints what --newest has installed.
VERSIONS='
import importlib.metadata, platform
print("python", platform.python_version())
for name in ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint",
             "transformers", "datasets"):
  print(name, importlib.metadata.version(name))
'
failed=()

# Runs the command after the name $1 under a heading; notes it when it fails.
section() {
  local name="$1"
  shift
  printf '\n== %s (%d s)\n' "$name" "$SECONDS"
  "$@" || failed+=("$name")
}

newest=''
pytest_args=()
for arg in "$@"; do
  if [[ "$arg" == --newest ]]; then newest=1; else pytest_args+=("$arg"); fi
done

if [[ "$newest" ]]; then
  VENV="${MA_RLHF_VENV:-$ROOT/.venv-newest}"
  VENV_PYTHON="$VENV/bin/python"
  PYTHON="${PYTHON:-$(find_newest_python)}"
  PIP_UPGRADE=(--upgrade --upgrade-strategy eager)
  ensure_venv newest
else
  ensure_venv test
fi
cd "$ROOT"
export JAX_PLATFORMS=cpu
# Most of the time goes into compiling many tiny programs: keep all of them.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$VENV/jax_cache}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

if [[ "$newest" ]]; then
  section 'versions' "$VENV_PYTHON" -c "$VERSIONS"
  section 'plan' "$VENV_PYTHON" -m ma_rlhf_jax.tools.plan \
    --config=configs/tldr_2b.py:lora --topology=v5e:1x1
else
  section 'ruff' "$VENV_PYTHON" -m ruff check .
  section 'pyink' "$VENV_PYTHON" -m pyink --check .
fi
section 'pytest' "$VENV_PYTHON" -m pytest \
  -n logical --maxprocesses 4 --dist loadfile --durations 10 "${pytest_args[@]}"

printf '\n== '
if ((${#failed[@]})); then
  printf 'failed: %s (%d s)\n' "${failed[*]}" "$SECONDS"
  exit 1
fi
printf 'passed (%d s)\n' "$SECONDS"
