"""Does the ladder's learning rate stay the right one from rung to rung?

python scripts/sweep.py --experiment=experiments/ladder/sweep.py --output=runs/ladder
"""

from typing import Any

from configs import ladder
from deepseek_jax.core.override import override
from deepseek_jax.core.precision import Float32
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.train.experiment import Experiment

baseline = 'rule'
DEPTHS = (2, 3, 4)
FACTORS = {'third': 1 / 3, 'rule': 1.0, 'thrice': 3.0}


def base() -> Experiment:
  """Returns the lowest rung; the whole held-out text is measured once, at the end."""
  changes = {
    'name': 'ladder',
    'precision': Float32(),
    'cadence.evaluate': None,
    'cadence.sample': None,
    'cadence.save': 500,
  }
  return override(ladder.get_config(DEPTHS[0]), changes)[0]


def variants() -> Sweep:
  """Returns every rung at a third of the rule's learning rate, at the rule's, and at thrice it."""
  return product(chain(**{f'depth_{depth}': rates(depth) for depth in DEPTHS}), seeds(2))


def rates(depth: int) -> Sweep:
  """Returns one rung at the three learning rates."""
  rung = ladder.get_config(depth)
  shape: dict[str, Any] = {
    'model': rung.model,
    'data': rung.data,
    'schedule': rung.schedule,
    'train_steps': rung.train_steps,
  }
  peak = rung.optimizer.peak_lr
  return chain(
    **{
      label: {**shape, 'optimizer.peak_lr': float(f'{factor * peak:.3g}')}
      for label, factor in FACTORS.items()
    }
  )
