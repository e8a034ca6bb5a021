"""Does predicting a second token help the first one, at equal FLOPs?

python scripts/sweep.py --experiment=experiments/mtp/sweep.py --output=runs/mtp
"""

from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.lab.match import FlopsPerToken
from deepseek_jax.models.mtp import MTP
from deepseek_jax.train.experiment import Experiment
from experiments.balance_kinds import sweep as balance_kinds

match = FlopsPerToken()
baseline = 'without'


def base() -> Experiment:
  """Returns the model of `balance_kinds`."""
  return override(balance_kinds.base(), {'name': 'mtp', 'train_steps': 240})[0]


def variants() -> Sweep:
  """Returns the model without and with a module that predicts the token after the next."""
  return product(chain(without={'model.mtp': None}, mtp={'model.mtp': MTP(depth=1)}), seeds(3))
