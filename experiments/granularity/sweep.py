"""Do more and smaller experts help at equal FLOPs, and what would a dense model of that loss cost?

python scripts/sweep.py --experiment=experiments/granularity/sweep.py --output=runs/granularity
"""

from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.train.experiment import Experiment
from experiments.balance_kinds import sweep as balance_kinds

baseline = 'experts_128'
HIDDEN, TOP_K, EXPERTS = 128, 2, 16


def base() -> Experiment:
  """Returns the model of `balance_kinds` with a third more hidden units, for 200 steps."""
  return override(
    balance_kinds.base(),
    {
      'name': 'granularity',
      'train_steps': 200,
      'cadence.evaluate': 100,
      'cadence.save': 100,
      'balance.rate': 1e-2,
    },
  )[0]


def variants() -> Sweep:
  """Returns experts cut into 1, 4 and 8 parts, and two dense models.

  In all but the last a token meets equally many weights. The last costs 1 / (1 - 0.57) times the
  FLOPs a token: what a dense model of equal loss would cost if experts saved 57 percent.
  """

  def experts(parts: int) -> dict[str, object]:
    moe = MoE(experts=EXPERTS * parts, top_k=TOP_K * parts, hidden=HIDDEN // parts, shared=parts)
    return {'model.feed_forward': moe}

  def dense(hidden: int) -> dict[str, object]:
    # A dense model has no router whose bias could be moved.
    return {'model.feed_forward': SwiGLU(hidden=hidden), 'balance': None}

  return product(
    chain(
      experts_16=experts(1),
      experts_64=experts(4),
      experts_128=experts(8),
      dense=dense((TOP_K + 1) * HIDDEN),
      dense_costly=dense(2960),
    ),
    seeds(3),
  )
