#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs: one process on each of its hosts.
#
#   docs/pods/tpu_vm.sh NAME ZONE --config=v3_671b --workdir=/shared/runs/first …
#
# Run it where `gcloud` is set up, with the project in ~/deepseek_jax on every host (scripts/setup.sh
# with --extras=tpu, if pip is to bring libtpu). --workdir lies on a disk that all hosts share
# (Filestore, or a bucket through gcsfuse). Each host asks the metadata server who it is.
set -u

if [ "$#" -lt 3 ]; then
  echo "usage: $0 NAME ZONE arguments of scripts/train.py" >&2
  exit 2
fi
name=$1
zone=$2
shift 2
arguments=$(printf ' %q' "$@")
pause=10
for attempt in 1 2 3 4 5; do
  if gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
    --command="cd deepseek_jax && .venv/bin/python scripts/train.py --cluster=tpu$arguments"; then
    exit 0
  fi
  echo "launch: start $attempt failed; again in $pause s" >&2
  # What is left on hosts whose connection broke would keep their chips.
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
    --command="pkill -f 'scripts/train.py --cluster=tpu' || true"
  sleep "$pause"
  pause=$((pause * 2))
done
echo 'launch: five starts failed: giving up' >&2
exit 1
