#!/usr/bin/env bash
# One process of a Slurm step; called by slurm.sh through srun.
#
#   slurm_task.sh FILE COMMAND
#
# Runs the command and notes its code in FILE where that tells of an error which
# would come again.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

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
