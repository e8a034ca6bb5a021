"""Do experts that come one after another, or choices that do, save compute at the same loss?

python scripts/sweep.py --experiment=experiments/progressive_experts/sweep.py --output=runs/growing
"""

from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.layers.moe.growth import Growth
from deepseek_jax.train.experiment import Experiment
from experiments.balance_kinds import sweep as balance_kinds

baseline = 'constant'


def base() -> Experiment:
  """Returns the model of `balance_kinds` with four choices a token, for 200 steps."""
  changes = {
    'name': 'progressive_experts',
    'model.feed_forward.top_k': 4,
    'balance.rate': 1e-2,
    'train_steps': 200,
    'cadence.evaluate': 100,
    'cadence.save': 100,
  }
  return override(balance_kinds.base(), changes)[0]


def variants() -> Sweep:
  """Returns experts that double twice, choices that double twice, and all of them always.

  All take as many steps: what growing choices save is in the FLOPs.
  """
  experts = Growth(experts=((0, 4), (0.25, 8), (0.5, 16)))
  choices = Growth(top_k=((0, 1), (0.25, 2), (0.5, 4)))
  growth = 'model.feed_forward.growth'
  return product(
    chain(constant={}, experts_grow={growth: experts}, choices_grow={growth: choices}), seeds(3)
  )
