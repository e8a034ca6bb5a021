#!/usr/bin/env bash
# Trains on several nodes under Slurm: one process a node, with all GPUs of the node.
#
#   sbatch docs/pods/slurm.sh --config=v3_671b --workdir=/shared/runs/first …
#
# --workdir lies on a disk that all nodes share. A node that dies ends the step; it is started again
# from the newest checkpoint, as long as checkpoints come. 120 s before the time limit, and when the
# job is preempted, the run saves and leaves.
#SBATCH --job-name=deepseek_jax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.out
set -u

workdir=
for word in "$@"; do
  case $word in --workdir=*) workdir=${word#--workdir=} ;; esac
done
if [ -z "$workdir" ]; then
  echo 'error: --workdir=… is missing' >&2
  exit 2
fi

newest() {
  find "$workdir/checkpoints" "$workdir/snapshots" -regex '.*/[0-9]+\(/_CHECKPOINT_METADATA\|\.json\)' \
    2>/dev/null | grep -oE '[0-9]+(/_CHECKPOINT_METADATA|\.json)$' | grep -oE '^[0-9]+' | sort -n | tail -1
}

stopped=
trap 'stopped=yes' TERM
fruitless=0
pause=10
while :; do
  before=$(newest)
  # One task that fails ends all; JAX ends the others too, but only after its heartbeat.
  srun --kill-on-bad-exit=1 .venv/bin/python scripts/train.py --cluster=slurm "$@" &
  wait $!
  code=$?
  if [ -n "$stopped" ]; then
    # Slurm has told the tasks as well; they are saving.
    wait
    exit 0
  fi
  [ "$code" -eq 0 ] && exit 0
  after=$(newest)
  if [ "${after:-0}" -gt "${before:-0}" ]; then
    fruitless=0
    pause=10
  else
    fruitless=$((fruitless + 1))
    pause=$((pause * 2))
  fi
  echo "launch: srun ended with code $code after step ${after:-0}; $workdir/logs says why" >&2
  if [ "$fruitless" -ge 3 ]; then
    echo 'launch: three starts in a row saved nothing new: giving up' >&2
    exit "$code"
  fi
  sleep "$pause"
done
