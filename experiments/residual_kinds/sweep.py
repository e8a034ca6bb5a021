"""Do several residual lanes learn more than one, at equal tokens and for little more compute?

python scripts/sweep.py --experiment=experiments/residual_kinds/sweep.py --output=runs/residuals
"""

from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.layers.hyper_connections import HyperConnections
from deepseek_jax.layers.residual import Add
from deepseek_jax.train.experiment import Experiment
from experiments.attention_kinds import sweep as attention_kinds

baseline = 'add'


def base() -> Experiment:
  """Returns the model of `attention_kinds` twice as deep, on shorter rows."""
  changes = {
    'name': 'residual_kinds',
    'model.depth': 8,
    'model.dense_layers': 8,
    'data.length': 256,
    'data.batch_size': 8,
  }
  return override(attention_kinds.base(), changes)[0]


def variants() -> Sweep:
  """Returns one lane, two and four."""
  return product(
    chain(
      add={'model.residual': Add()},
      lanes_2={'model.residual': HyperConnections(lanes=2)},
      lanes_4={'model.residual': HyperConnections(lanes=4)},
    ),
    seeds(3),
  )
