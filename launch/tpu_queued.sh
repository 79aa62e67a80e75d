#!/usr/bin/env bash
# usage: ./launch/tpu_queued.sh --name=NAME --zone=ZONE --accelerator_type=TYPE
#          --runtime_version=VERSION [flags] -- COMMAND
#
# One run on a TPU that is asked for, waited for, and asked for again after it
# was preempted. Needs gcloud with its alpha commands, logged in. The TPU is a
# queued resource with autocheckpoint: before maintenance and preemption the
# processes are told, and save. Installs and runs as tpu_vm.sh does.
#
# flags:
#   --name=NAME                The name of the queued resource and of its TPU.
#                              It is needed, as the next three are.
#   --zone=ZONE                The zone of the TPU.
#   --accelerator_type=TYPE    The kind and size of the TPU.
#   --runtime_version=VERSION  The software of its virtual machines.
#   --project=ID               The project of the TPU. Default: that of gcloud.
#   --spot                     The TPU is cheaper, and may be taken away at any
#                              time. Default: off.
#   --keep                     The TPU is kept when the command is done.
#                              Default: it is deleted, after an error too.
#   --dir=DIR                  The folder on the workers, in their home.
#                              Default: ma_rlhf_jax.
#   --poll=SECONDS             How long to wait between two looks at the state
#                              of the TPU. Default: 30.
#   --max_restarts=N           How often the command is run again. Default: 10.
#   --pause=SECONDS            How long to wait before that. Default: 60.
#   --dry_run                  Prints what would be run, and runs nothing.
#   -h, --help                 Prints this text.
#
# Exit codes: 0 the command is done; 2 a flag is wrong; else that of the
# command, which is run again after 75, 134, 137, 143 and 255: it was preempted,
# or lost another process or its connection. launch/common.sh says more.
#
# examples:
#   ./launch/tpu_queued.sh --name=my-pod --zone=us-east5-a --spot \
#     --accelerator_type=v5p-32 --runtime_version=v2-alpha-tpuv5 -- \
#     python -m ma_rlhf_jax.train --config=configs/hh_7b.py \
#     --workdir=gs://my-bucket/run
#   ./launch/tpu_queued.sh --name=my-pod --zone=us-east5-a --keep \
#     --accelerator_type=v5p-32 --runtime_version=v2-alpha-tpuv5 -- \
#     python -m ma_rlhf_jax.evaluate --workdir=gs://my-bucket/run

# shellcheck disable=SC2329 # with_restarts and trap call the functions
set -euo pipefail
here="$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$here/common.sh"
answer_help "$@"

name='' zone='' project='' type='' version='' dir=ma_rlhf_jax
spot=0 keep=0 poll=30 deleted=0
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --accelerator_type=*) type="${1#*=}" ;;
    --runtime_version=*) version="${1#*=}" ;;
    --dir=*) dir="${1#*=}" ;;
    --poll=*) poll="${1#*=}" ;;
    --spot) spot=1 ;;
    --keep) keep=1 ;;
    --)
      shift
      break
      ;;
    *) shared_flag "$1" || unknown_flag "$1" ;;
  esac
  shift
done
check_name --name "$name" my-pod
check_name --zone "$zone" us-east5-a
[[ -z "$project" ]] || check_name --project "$project" my-project
check_name --accelerator_type "$type" v5p-32
check_name --runtime_version "$version" v2-alpha-tpuv5
check_name --dir "$dir" ma_rlhf_jax
check_number --poll "$poll" 0
check_shared
check_command "$@"
((dry_run)) || command -v gcloud >/dev/null \
  || die 'no gcloud on PATH: see cloud.google.com/sdk/docs/install'

where=("--zone=$zone")
[[ -z "$project" ]] || where+=("--project=$project")
queued=(gcloud alpha compute tpus queued-resources)
describe=("${queued[@]}" describe "$name" "${where[@]}"
  '--format=value(state.state)')
create=("${queued[@]}" create "$name" "${where[@]}" "--node-id=$name"
  "--accelerator-type=$type" "--runtime-version=$version"
  --autocheckpoint-enabled)
((!spot)) || create+=(--spot)
delete=("${queued[@]}" delete "$name" "${where[@]}" --force --quiet)
train=(bash "$here/tpu_vm.sh" "--tpu=$name" "${where[@]}" "--dir=$dir"
  --install --max_restarts=0 -- "$@")
# Prints the state of the queued resource; NONE where there is none.
state() {
  local found
  if found="$("${describe[@]}" 2>"$errors")"; then
    echo "${found:-UNKNOWN}"
  elif grep -qi 'not.found' "$errors"; then
    echo NONE
  else
    cat "$errors" >&2
    return 1
  fi
}

# Returns once the TPU is there.
wait_for_tpu() {
  local now before=''
  while true; do
    now="$(state)" || return 255 # no answer; perhaps later
    [[ "$now" == "$before" ]] || say "$name: $now"
    before="$now"
    case "$now" in
      ACTIVE) return 0 ;;
      NONE) "${create[@]}" || return 1 ;;
      FAILED | SUSPENDING | SUSPENDED) "${delete[@]}" || return 1 ;;
      *) sleep "$poll" ;;
    esac
  done
}

# Also after Ctrl-C, which leaves the TPU as it is.
finish() {
  rm -f "$errors"
  ((deleted)) || say "$name is kept and costs; to delete it:" \
    "$(quoted "${delete[@]}")"
}

# Runs the command once; 75 where the TPU is gone, whatever the command said.
attempt() {
  local code=0
  wait_for_tpu || return $?
  "${train[@]}" || code=$?
  if ((code)) && [[ "$(state)" != ACTIVE ]]; then
    code=75
  fi
  return "$code"
}

if ((dry_run)); then
  quoted "${describe[@]}"
  quoted "${create[@]}"
  bash "$here/tpu_vm.sh" --dry_run "${train[@]:2}"
  ((keep)) || quoted "${delete[@]}"
  exit 0
fi

errors="$(mktemp)"
trap finish EXIT
code=0
with_restarts attempt || code=$?
if ((!keep)) && "${delete[@]}"; then
  deleted=1
fi
exit "$code"
