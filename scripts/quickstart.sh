#!/usr/bin/env bash
# Sets up, trains a small DeepSeek-V3 on English for a few minutes, measures it and lets it write.
# Arguments go to scripts/train.py, for example --config.train_steps=50.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
scripts/setup.sh
python=.venv/bin/python
workdir="${WORKDIR:-runs/quickstart}"

echo
echo "== training (configs/quickstart.py → $workdir)"
SECONDS=0
"$python" scripts/train.py --config=configs/quickstart.py --workdir="$workdir" "$@"
echo "training took $((SECONDS / 60)) min $((SECONDS % 60)) s"

echo
echo "== held-out text"
"$python" scripts/evaluate.py --workdir="$workdir"

echo
echo "== continuations"
"$python" scripts/generate.py --workdir="$workdir" --tokens=60 --seed=1 --temperature=0.8 --top_p=0.95 \
  --prompt='The people of the United States' \
  --prompt='And the LORD said unto' \
  --prompt='She was very'

"$python" scripts/plot_run.py --workdir="$workdir"
"$python" scripts/report.py --workdir="$workdir"   # again: now with the yardsticks

cat <<END

== next steps
the checkpoints      $workdir/checkpoints
the whole run        $workdir/report.html
the curves           $workdir/run.png   (or, after pip install tensorboard: tensorboard --logdir=$workdir/tensorboard)
another attention    $python scripts/train.py --config=quickstart --workdir=runs/window --config.model.attention='Window(size=64)'
your own text        $python scripts/train.py --config=quickstart --workdir=runs/mine --config.data.source='TextFiles("path/to/*.txt")'
look before you run  $python scripts/train.py --config=quickstart --config.model.depth=8 --dry_run
an hour instead      $python scripts/train.py --config=cpu_hour --workdir=runs/hour
write something      $python scripts/generate.py --workdir=$workdir --prompt='It is a truth universally acknowledged'
the tests            scripts/test.sh
END
