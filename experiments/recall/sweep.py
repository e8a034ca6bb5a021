"""Sparse attention on a dense model that can look things up: what does it still find?

python scripts/train.py --config=configs/recall.py --workdir=runs/recall
for length in 65 512 2048; do
  python scripts/train.py --config="experiments/recall/longer.py(length=$length)" \
    --workdir=runs/recall_$length
done
python scripts/train.py --config=experiments/recall/warm_up.py --workdir=runs/recall_warm_up
python scripts/sweep.py --experiment=experiments/recall/sweep.py --output=runs/recall_kinds
python -m experiments.recall.reach --runs=runs/recall_kinds
"""

from typing import Any

from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.init_from import InitFrom
from experiments.recall import longer

baseline = 'dense'
ATTENTION = 'model.attention'
LENGTH = 2048
"""Symbols of a row in which the kinds take their place."""
KEPT = 614
"""Keys of a query: 30 percent of a row."""
FEW = 32
SPARSE = f'DSA(top_k={FEW}, indexer=Indexer(heads=4, dim=32))'


def base() -> Experiment:
  """Returns the dense model, which goes on for some steps."""
  changes = {
    'name': 'recall_kinds',
    'data.batch_size': 4,
    'optimizer.peak_lr': 2e-3,
    'train_steps': 50,
    'cadence.log': 10,
    'cadence.evaluate': 50,
    'cadence.save': 50,
    'init_from': InitFrom('runs/recall_2048'),
  }
  return override(longer.get_config(LENGTH), changes)[0]


def variants() -> Sweep:
  """Returns kinds that see 30 percent of a full row, and others that see much less.

  Sizes of heads are those of the model.
  """
  kinds = {
    'window': f'Window(size={KEPT}, sinks=4)',
    'gated_share': 'Gated(keep=Share(share=0.3), block=16, window=16)',
    'gated_log': 'Gated(keep=Log(factor=16.0), block=16, window=16)',
    'dsa_cold': SPARSE,
    'dsa_warmed': SPARSE,
    'top_k': f'TopK(top_k={FEW})',
  }
  changed: dict[str, dict[str, Any]] = {name: {ATTENTION: kind} for name, kind in kinds.items()}
  changed['dsa_warmed']['init_from'] = InitFrom('runs/recall_warm_up')
  return product(chain(dense={}, **changed), seeds(3))
