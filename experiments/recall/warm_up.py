"""The indexer learns from dense attention that can look things up, and all else is frozen.

Command:  python scripts/train.py --config=experiments/recall/warm_up.py \
            --workdir=runs/recall_warm_up
Hardware: 2 CPU cores. Time: three minutes, after `longer.py`.
"""

from deepseek_jax.core.override import override
from deepseek_jax.layers.attention.sparse import WarmUp
from deepseek_jax.train.experiment import Experiment
from experiments.recall import sweep


def get_config() -> Experiment:
  """Returns as many steps as the kinds have, at five times their learning rate."""
  changes = {
    'name': 'recall_warm_up',
    'optimizer.peak_lr': 1e-2,
    'trainable': ('*/attention/indexer/*',),
    sweep.ATTENTION: sweep.SPARSE,
    f'{sweep.ATTENTION}.stage': WarmUp(),
  }
  return override(sweep.base(), changes)[0]
