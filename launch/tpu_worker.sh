#!/usr/bin/env bash
# usage: tpu_worker.sh COMMAND
#
# One worker of a TPU; tpu_vm.sh calls it through ssh, in the checkout. Runs the
# command in the environment .venv that --install has made. A process that a
# lost connection has left behind holds the chips: it is told to save, and ended
# after two minutes.
#
# flags:
#   -h, --help    Prints this text.
#
# The exit code is that of the command.
#
# examples:
#   bash launch/tpu_worker.sh python -m ma_rlhf_jax.train
#   bash launch/tpu_worker.sh python -c 'import jax; print(jax.devices())'
set -euo pipefail
# shellcheck source=launch/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
answer_help "${1:-}"

pid_file="$HOME/.ma_rlhf_jax.pid"
old="$(cat "$pid_file" 2>/dev/null || true)"

# Whether the process of the last start is still there, and no other that got
# its number.
left_behind() {
  [[ "$old" =~ ^[0-9]+$ ]] && grep -qs ma_rlhf_jax "/proc/$old/cmdline"
}

if left_behind; then
  kill -TERM "$old" || true
  for ((i = 0; i < 120; i++)); do
    left_behind || break
    sleep 1
  done
  if left_behind; then
    kill -KILL "$old" || true
  fi
fi
echo "$$" >"$pid_file"
export PATH="$PWD/.venv/bin:$PATH"
exec "$@"
