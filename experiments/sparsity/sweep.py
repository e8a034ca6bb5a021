"""Does it help to have more experts than a token uses, at equal FLOPs?

python scripts/sweep.py --experiment=experiments/sparsity/sweep.py --output=runs/sparsity
"""

from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.lab.match import FlopsPerToken
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.train.experiment import Experiment
from experiments.balance_kinds import sweep as balance_kinds

match = FlopsPerToken()
baseline = 'dense'
HIDDEN, TOP_K = 96, 2


def base() -> Experiment:
  """Returns the model of `balance_kinds`."""
  return override(balance_kinds.base(), {'name': 'sparsity'})[0]


def variants() -> Sweep:
  """Returns a dense model and three of experts; a token meets equal feed-forward weights in all."""

  def experts(count: int) -> dict[str, object]:
    moe = MoE(experts=count, top_k=TOP_K, hidden=HIDDEN, shared=1)
    return {'model.feed_forward': moe}

  # A dense model has no router whose bias could be moved.
  dense = {'model.feed_forward': SwiGLU(hidden=(TOP_K + 1) * HIDDEN), 'balance': None}
  return product(
    chain(dense=dense, experts_8=experts(8), experts_16=experts(16), experts_64=experts(64)),
    seeds(3),
  )
