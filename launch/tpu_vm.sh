#!/usr/bin/env bash
# usage: ./launch/tpu_vm.sh --tpu=NAME --zone=ZONE [flags] -- COMMAND
#
# One run on all workers of a TPU VM or pod slice that exists. Needs gcloud,
# logged in. The workdir must be in a bucket, which all workers and the next
# start see.
#
# flags:
#   --tpu=NAME          The name of the TPU. It is needed.
#   --zone=ZONE         The zone of the TPU. It is needed.
#   --project=ID        The project of the TPU. Default: that of gcloud.
#   --install           First copies the last commit of this checkout to the
#                       workers, and installs what setup.py asks for. Needed
#                       once, and for each new commit. Default: off.
#   --dir=DIR           The folder on the workers, in their home. Default:
#                       ma_rlhf_jax.
#   --max_restarts=N    How often the command is run again. Default: 10.
#   --pause=SECONDS     How long to wait before that. Default: 60.
#   --dry_run           Prints what would be run, and runs nothing.
#   -h, --help          Prints this text.
#
# Exit codes: 0 the command is done; 2 a flag is wrong; else that of the
# command, which is run again after 75, 134, 137, 143 and 255: it was preempted,
# or lost another process or its connection. launch/common.sh says more.
# Where worker 0 ends in order and others do not, the code is that of the first
# that failed. A TPU that was preempted is not made anew; tpu_queued.sh does so.
#
# examples:
#   ./launch/tpu_vm.sh --tpu=my-pod --zone=us-east5-a --install -- \
#     python -m ma_rlhf_jax.train --config=configs/hh_7b.py \
#     --workdir=gs://my-bucket/run
#   ./launch/tpu_vm.sh --tpu=my-pod --zone=us-east5-a -- \
#     python -m ma_rlhf_jax.evaluate --workdir=gs://my-bucket/run
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"
answer_help "$@"

tpu='' zone='' project='' dir=ma_rlhf_jax install=0
while (($#)); do
  case "$1" in
    --tpu=*) tpu="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --dir=*) dir="${1#*=}" ;;
    --install) install=1 ;;
    --)
      shift
      break
      ;;
    *) shared_flag "$1" || unknown_flag "$1" ;;
  esac
  shift
done
check_name --tpu "$tpu" my-pod
check_name --zone "$zone" us-east5-a
[[ -z "$project" ]] || check_name --project "$project" my-project
check_name --dir "$dir" ma_rlhf_jax
check_shared
check_command "$@"
((dry_run)) || command -v gcloud >/dev/null \
  || die 'no gcloud on PATH: see cloud.google.com/sdk/docs/install'

where=("--zone=$zone")
[[ -z "$project" ]] || where+=("--project=$project")

# Runs the text $1 in a shell on every worker.
on_workers() {
  run gcloud compute tpus tpu-vm ssh "$tpu" "${where[@]}" --worker=all \
    "--command=$1"
}

install_on_workers() {
  local archive="$dir.tar.gz" unpack
  unpack="mkdir -p $dir && tar -xzf $archive -C $dir && cd $dir"
  unpack+=' && source launch/setup_venv.sh && ensure_venv tpu'
  run git -C "$root" archive --format=tar.gz "--output=$scratch/$archive" \
    HEAD \
    && run gcloud compute tpus tpu-vm scp "$scratch/$archive" "$tpu:$archive" \
      "${where[@]}" --worker=all \
    && on_workers "$unpack"
}

if ((install)); then
  scratch=/tmp
  if ((!dry_run)); then
    scratch="$(mktemp -d)"
    trap 'rm -rf "$scratch"' EXIT
  fi
  install_on_workers
fi
with_restarts on_workers "cd $dir && exec bash launch/tpu_worker.sh $(quoted "$@")"
