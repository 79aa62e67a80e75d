#!/usr/bin/env bash
# usage: ./launch/local.sh --num_processes=N [flags] -- COMMAND
#
# Runs several processes of one run on this machine, on its CPU or its GPUs. One
# process drives all GPUs of a machine as well, without this script; several
# share the work of the host. Each gets the command and the flags that say which
# process it is. --coordinator_address is 127.0.0.1:PORT.
#
# flags:
#   --num_processes=N       The number of processes, at least 1. It is needed.
#   --gpus_per_process=K    The number of GPUs of each process: process I sees
#                           the GPUs K I to K I + K - 1. Default: 0, which
#                           leaves CUDA_VISIBLE_DEVICES as it is.
#   --port=PORT             A port that is free on this machine. Default: 8476.
#   --grace=SECONDS         How long the other processes may take to end by
#                           themselves once one has failed. Default: 20.
#   --max_restarts=N        How often the command is run again. Default: 10.
#   --pause=SECONDS         How long to wait before that. Default: 5.
#   --dry_run               Prints what would be run, and runs nothing.
#   -h, --help              Prints this text.
#
# Ctrl-C or SIGTERM saves and stops; a second one stops at once.
#
# Exit codes: 0 the command is done; 2 a flag is wrong; else that of the
# command, which is run again after 75, 134, 137, 143 and 255: it was preempted,
# or lost another process or its connection. launch/common.sh says more.
#
# examples:
#   ./launch/local.sh --num_processes=2 -- python -m ma_rlhf_jax.train
#   ./launch/local.sh --num_processes=2 --gpus_per_process=4 -- \
#     python -m ma_rlhf_jax.train --config=configs/hh_7b.py --workdir=runs/hh
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
answer_help "$@"

num_processes=''
gpus_per_process=0
port=8476
grace=20
pause=5
while (($#)); do
  case "$1" in
    --num_processes=*) num_processes="${1#*=}" ;;
    --gpus_per_process=*) gpus_per_process="${1#*=}" ;;
    --port=*) port="${1#*=}" ;;
    --grace=*) grace="${1#*=}" ;;
    --)
      shift
      break
      ;;
    *) shared_flag "$1" || unknown_flag "$1" ;;
  esac
  shift
done
check_number --num_processes "$num_processes" 1
check_number --gpus_per_process "$gpus_per_process" 0
check_number --port "$port" 1 65535
check_number --grace "$grace" 0
check_shared
check_command "$@"
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) \
  || die "bash $BASH_VERSION: needs 5.1 or newer"

pids=()

# The first signal is passed on as a wish to save and stop.
stop() {
  stopping=$((stopping + 1))
  if ((stopping == 1)); then
    end_others TERM
  else
    end_others KILL
  fi
}

end_others() {
  ((${#pids[@]})) && kill "-$1" "${pids[@]}" 2>/dev/null || true
}

trap stop INT TERM
trap 'end_others KILL' USR1

# Starts process $1 of the command that follows.
start() {
  local id="$1" first gpus
  shift
  set -- "$@" "--coordinator_address=127.0.0.1:$port" \
    "--num_processes=$num_processes" "--process_id=$id"
  if ((gpus_per_process)); then
    first=$((id * gpus_per_process))
    gpus="$(seq -s, "$first" $((first + gpus_per_process - 1)))"
    set -- env "CUDA_VISIBLE_DEVICES=$gpus" "$@"
  fi
  if ((dry_run)); then
    quoted "$@"
  else
    exec "$@"
  fi
}

# Runs all processes once; the code of the first that failed, 0 if none did.
attempt() {
  local id pid code=0 status watch=''
  pids=()
  for ((id = 0; id < num_processes; id++)); do
    if ((dry_run)); then
      start "$id" "$@"
    else
      (trap - INT TERM USR1; start "$id" "$@") &
      pids+=("$!")
    fi
  done
  while ((${#pids[@]})); do
    status=0 pid=''
    wait -n -p pid "${pids[@]}" || status=$?
    [[ -n "${pid:-}" ]] || continue # a signal came
    forget "$pid"
    if ((status && !code)); then
      code=$status
      (sleep "$grace"; kill -USR1 "$$") 2>/dev/null &
      watch=$!
    fi
  done
  if [[ -n "$watch" ]]; then
    kill "$watch" 2>/dev/null || true
  fi
  return "$code"
}

# Takes $1 out of the processes that still run.
forget() {
  local pid left=()
  for pid in "${pids[@]}"; do
    [[ "$pid" == "$1" ]] || left+=("$pid")
  done
  pids=("${left[@]+"${left[@]}"}")
}

with_restarts attempt "$@"
