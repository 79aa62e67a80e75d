#!/usr/bin/env bash
# One run on all workers of a TPU VM or pod slice that is there.
#
#   ./launch/tpu_vm.sh --tpu=NAME --zone=ZONE [flags] -- COMMAND
#
#   ./launch/tpu_vm.sh --tpu=my-pod --zone=us-east5-a --install -- \
#     python -m ma_rlhf_jax.train --config=configs/hh_7b.py \
#     --workdir=gs://my-bucket/run
#
# Needs gcloud, logged in. The workdir must be in a bucket, which all workers
# and the next start see. Code and environment come by --install: the last
# commit of this checkout, and what setup.py asks for.
#
#   --tpu=NAME --zone=ZONE   of the TPU
#   --project=ID             default: that of gcloud
#   --install                copies and installs first; needed once, and for
#                            each new commit
#   --dir=DIR                folder on the workers, in their home; default
#                            ma_rlhf_jax
#   --max_restarts=N --pause=SECONDS --dry_run   see common.sh
#
# Where worker 0 ends in order and others do not, the code is that of the first
# that failed. A TPU that was preempted is not made anew: see tpu_queued.sh.
set -euo pipefail
root="$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/common.sh
source "$root/launch/common.sh"

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
