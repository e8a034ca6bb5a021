"""Six ways to choose experts, at equal FLOPs: who learns best, and whose experts are used?

python scripts/sweep.py --experiment=experiments/router_kinds/sweep.py --output=runs/router_kinds
"""

from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.lab.match import FlopsPerToken
from deepseek_jax.layers.moe.balance import ExpertBalance
from deepseek_jax.layers.moe.router.balanced import Balanced
from deepseek_jax.layers.moe.router.expert_attention import ExpertAttention
from deepseek_jax.layers.moe.router.hash import Hash
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.layers.moe.router.softmax import Softmax
from deepseek_jax.layers.moe.router.sqrt_softplus import SqrtSoftplus
from deepseek_jax.optim.balance import SignBias
from deepseek_jax.train.experiment import Experiment
from experiments.balance_kinds import sweep as balance_kinds

match = FlopsPerToken()
baseline = 'sigmoid'
ROUTER, LOSS, BIAS = 'model.feed_forward.router', 'model.feed_forward.balance', 'balance'


def base() -> Experiment:
  """Returns the model of `balance_kinds`, for 200 steps."""
  changes = {
    'name': 'router_kinds',
    'train_steps': 200,
    'cadence.evaluate': 100,
    'cadence.save': 100,
    LOSS: None,
    BIAS: None,
  }
  return override(balance_kinds.base(), changes)[0]


def variants() -> Sweep:
  """Returns the routers, each balanced as in its paper; two once more without, one with a loss.

  A bias moves by a hundredth a step where scores are about a half each; the scores of
  ExpertAttention sum to 1 over 16 experts, and its bias moves by an eighth of that.
  """
  vocab = base().model.vocab
  return product(
    chain(
      sigmoid={ROUTER: Sigmoid(), BIAS: SignBias(rate=1e-2)},
      softmax={ROUTER: Softmax(), LOSS: ExpertBalance(weight=1e-2)},
      sqrt_softplus={ROUTER: SqrtSoftplus(), BIAS: SignBias(rate=1e-2)},
      hash={ROUTER: Hash(vocab=vocab)},
      balanced={ROUTER: Balanced()},
      expert_attention={ROUTER: ExpertAttention(), BIAS: SignBias(rate=1.25e-3)},
      expert_attention_free={ROUTER: ExpertAttention()},
      expert_attention_loss={ROUTER: ExpertAttention(), LOSS: ExpertBalance(weight=1e-2)},
      sigmoid_free={ROUTER: Sigmoid()},
    ),
    seeds(3),
  )
