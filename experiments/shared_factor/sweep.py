"""What do experts lose that share most of their weights, and what do fewer experts lose?

python scripts/sweep.py --experiment=experiments/shared_factor/sweep.py --output=runs/shared_factor
"""

from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.layers.moe.experts import SharedFactor
from deepseek_jax.train.experiment import Experiment
from experiments.balance_kinds import sweep as balance_kinds

baseline = 'separate'


def base() -> Experiment:
  """Returns the model of `balance_kinds`, for 200 steps."""
  changes = {
    'name': 'shared_factor',
    'balance.rate': 1e-2,
    'train_steps': 200,
    'cadence.evaluate': 100,
    'cadence.save': 100,
  }
  return override(balance_kinds.base(), changes)[0]


def variants() -> Sweep:
  """Returns 16 experts of their own, 16 that share a factor, and as many as fit into its bytes.

  Rank 20 leaves 43 percent of the bytes of 16 experts, and 7 experts of their own are 44.
  """
  return product(
    chain(
      separate={},
      shared_factor={'model.feed_forward.form': SharedFactor(rank=20)},
      fewer={'model.feed_forward.experts': 7},
    ),
    seeds(3),
  )
