#!/usr/bin/env bash
# usage: sbatch [flags of sbatch] launch/slurm.sh [flags] -- COMMAND
#
# One run on GPU nodes of a Slurm cluster, a process for each GPU. Submit it in
# the checkout, which all nodes must see, as they must see --workdir.
#
# Flags of sbatch: --nodes (default: 2), --time (default: 24:00:00),
# --partition, --account and others; the #SBATCH lines of this file set the
# defaults. --ntasks-per-node must equal --gpus-per-node (default: 8 of each):
# jax gives each process the GPU of its number.
#
# flags:
#   --max_restarts=N    How often the job is queued again under the same number
#                       after it was cut off. Default: 10.
#   --pause=SECONDS     How long to wait before that. Default: 60.
#   --dry_run           Prints the step of a job, and runs nothing.
#   -h, --help          Prints this text.
#
# Exit codes: 0 the command is done; 2 a flag is wrong; else that of the
# command, which is run again after 75, 134, 137, 143 and 255: it was preempted,
# or lost another process or its connection. launch/common.sh says more.
#
# examples:
#   sbatch --nodes=4 launch/slurm.sh -- .venv/bin/python -m ma_rlhf_jax.train \
#     --config=configs/hh_7b.py --workdir=/shared/run
#   ./launch/slurm.sh --dry_run -- .venv/bin/python -m ma_rlhf_jax.train
#SBATCH --job-name=ma_rlhf_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
# After a node has failed, or the job was preempted, Slurm queues it again.
#SBATCH --requeue
# Two minutes before the time is up the processes are told to save.
#SBATCH --signal=TERM@120
set -euo pipefail
# Slurm runs a copy of this file from elsewhere.
root="${SLURM_SUBMIT_DIR:-}"
if [[ -z "$root" ]]; then
  root="$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
fi
if [[ ! -f "$root/launch/common.sh" ]]; then
  echo "error: SLURM_SUBMIT_DIR=$root is not the checkout; run sbatch there" >&2
  exit 2
fi
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"
answer_help "$@"

while (($#)); do
  case "$1" in
    --)
      shift
      break
      ;;
    *) shared_flag "$1" || unknown_flag "$1" ;;
  esac
  shift
done
check_shared
check_command "$@"
if [[ -z "${SLURM_JOB_ID:-}" ]] && ((!dry_run)); then
  die 'this is no job of Slurm: submit it by sbatch, or look with --dry_run'
fi

# Which process failed for good, if one did: srun tells the largest code only,
# which is that of those it killed in turn.
failed="$root/.slurm-${SLURM_JOB_ID:-JOB}.failed"
step=(srun --kill-on-bad-exit=1 --gpu-bind=none
  bash "$root/launch/slurm_task.sh" "$failed" "$@")
requeue=(scontrol requeue "${SLURM_JOB_ID:-JOB}")
if ((dry_run)); then
  quoted "${step[@]}"
  quoted "${requeue[@]}"
  exit 0
fi

rm -f "$failed"
code=0
"${step[@]}" || code=$?
if [[ -s "$failed" ]]; then
  code="$(head -n 1 "$failed")"
  rm -f "$failed"
fi
goes_on "$code" || exit "$code"
restarts="${SLURM_RESTART_COUNT:-0}"
if ((restarts >= max_restarts)); then
  say "ended with $code; no restart is left of --max_restarts=$max_restarts"
  exit "$code"
fi
say "ended with $code; restart $((restarts + 1)) of $max_restarts in $pause s"
sleep "$pause"
"${requeue[@]}"
