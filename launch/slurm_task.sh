#!/usr/bin/env bash
# usage: slurm_task.sh FILE COMMAND
#
# One process of a Slurm step; slurm.sh calls it through srun. Runs the command,
# and notes its exit code in FILE where that tells of an error that would come
# again.
#
# flags:
#   -h, --help    Prints this text.
#
# Exit codes: 2 an argument is missing; else that of the command.
#
# examples:
#   srun bash launch/slurm_task.sh failed python -m ma_rlhf_jax.train
#   bash launch/slurm_task.sh /tmp/failed true
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
answer_help "${1:-}"

(($# >= 2)) || die 'usage: slurm_task.sh FILE COMMAND'
file="$1"
shift
trap : TERM # Slurm signals this shell too, which waits for the command
code=0
"$@" || code=$?
if ((code)) && ! goes_on "$code"; then
  echo "$code" >"$file"
fi
exit "$code"
