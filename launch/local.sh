#!/usr/bin/env bash
# Several processes of one run on this machine, on its CPU or its GPUs.
#
#   ./launch/local.sh --num_processes=2 [flags] -- COMMAND
#
#   ./launch/local.sh --num_processes=2 --gpus_per_process=4 -- \
#     python -m ma_rlhf_jax.train --config=configs/hh_7b.py --workdir=DIR
#
# One process drives all GPUs of a machine as well, without this script; several
# share the work of the host. Each gets the command and the flags that say who
# it is. --coordinator_address is 127.0.0.1:PORT.
#
#   --num_processes=N      processes, at least 1
#   --gpus_per_process=K   process i sees the GPUs K i .. K i + K - 1 and no
#                          other; default 0: CUDA_VISIBLE_DEVICES as it is
#   --port=PORT            free on this machine; default 8476
#   --grace=SECONDS        for the others to end by themselves, once one has
#                          failed; default 20
#   --max_restarts=N --pause=SECONDS --dry_run   see common.sh; pause is 5
#
# Ctrl-C or SIGTERM saves and stops; a second one stops at once.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

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
