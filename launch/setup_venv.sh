# shellcheck shell=bash
# The virtual environment of the launch scripts; sourced by them.
#
# PYTHON         the interpreter; default: the first on PATH that fits
# MA_RLHF_VENV   folder of the environment; default: .venv of the checkout

# shellcheck source=launch/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"

ROOT="$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${MA_RLHF_VENV:-$ROOT/.venv}"
[[ "$VENV" == /* ]] || VENV="$PWD/$VENV"
VENV_PYTHON="$VENV/bin/python"

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# True where $1 runs and is a Python that this package supports.
fits() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
    >/dev/null 2>&1
}

# Prints the interpreter to make the environment with.
find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    fits "$PYTHON" || die "PYTHON=$PYTHON is no Python >= 3.11, < 3.14"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if fits "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die 'no Python >= 3.11, < 3.14 on PATH; install one or set PYTHON=/path/to/it'
}

# Prints the newest interpreter that fits, of PATH and of pyenv.
find_newest_python() {
  local candidate
  for candidate in python3.13 "$HOME"/.pyenv/versions/3.13*/bin/python \
    python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python python3.11 python3; do
    if fits "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  die 'no Python >= 3.11, < 3.14 found; set PYTHON=/path/to/it'
}

# Makes $VENV anew, also where Python came without ensurepip (Debian without
# its package python3-venv): then the pip outside installs one inside.
make_venv() {
  local python
  python="$(find_python)"
  if [[ -e "$VENV" && ! -f "$VENV/pyvenv.cfg" ]]; then
    die "$VENV exists and is no virtual environment; set MA_RLHF_VENV=DIR"
  fi
  echo "Making a virtual environment in $VENV"
  if "$python" -m venv --clear "$VENV" >/dev/null 2>&1; then
    return
  fi
  if "$python" -m venv --without-pip --clear "$VENV" \
    && "$python" -m pip --python "$VENV_PYTHON" install -qq pip; then
    return
  fi
  die "$python cannot make a virtual environment in $VENV; install its venv" \
    "module (Debian, Ubuntu: apt install python3-venv) or another Python"
}

# What an installation depends on, in one line: place, Python, setup.py and the
# version that it reads.
stamp() {
  { echo "$ROOT"; "$VENV_PYTHON" -VV
    cat "$ROOT/setup.py" "$ROOT/ma_rlhf_jax/__init__.py"; } | cksum
}

# Installs this checkout, editable, with the extra $1 (may be missing) into
# $VENV. Where the stamp of an earlier call fits, pip is not run at all.
ensure_venv() {
  local extra="${1:-}" wanted
  if ! fits "$VENV_PYTHON"; then
    make_venv
  elif [[ -n "${PYTHON:-}" \
    && "$("$PYTHON" -V 2>&1)" != "$("$VENV_PYTHON" -V)" ]]; then
    die "PYTHON=$PYTHON is not the $("$VENV_PYTHON" -V) of $VENV; remove that" \
      'folder or set MA_RLHF_VENV=DIR'
  fi
  wanted="$(stamp)"
  if [[ "$(cat "$VENV/.installed$extra" 2>/dev/null)" == "$wanted" ]]; then
    return
  fi
  if ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
    make_venv # an earlier start was cut off
  fi
  echo "Installing into $VENV (once, takes minutes)"
  "$VENV_PYTHON" -m pip install -qq --no-input --disable-pip-version-check \
    ${PIP_UPGRADE[@]+"${PIP_UPGRADE[@]}"} --editable "$ROOT${extra:+[$extra]}"
  # The package itself comes with every extra.
  echo "$wanted" | tee "$VENV/.installed" >"$VENV/.installed$extra"
}
