"""The indexer learns from dense attention, and all else is frozen.

Command:  python scripts/train.py --config=experiments/indexer_stages/warm_up.py \
            --workdir=runs/warm_up
Hardware: 2 CPU cores. Time: a minute, after `dense.py`.
"""

from deepseek_jax.core.override import override
from deepseek_jax.layers.attention.indexer import Indexer
from deepseek_jax.layers.attention.sparse import DSA, WarmUp
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.init_from import InitFrom
from experiments.attention_kinds.sweep import ATTENTION, LATENT
from experiments.indexer_stages import dense

INDEXER = Indexer(heads=4, dim=16)
TOP_K = 32


def get_config() -> Experiment:
  """Returns the warm-up: a tenth of the steps of the dense model, at its learning rate."""
  changes = {
    'name': 'warm_up',
    'train_steps': 30,
    'cadence.evaluate': 30,
    'cadence.save': 30,
    'init_from': InitFrom('runs/dense'),
    'trainable': ('*/attention/indexer/*',),
    ATTENTION: DSA(**LATENT, indexer=INDEXER, top_k=TOP_K, stage=WarmUp()),
  }
  return override(dense.get_config(), changes)[0]
