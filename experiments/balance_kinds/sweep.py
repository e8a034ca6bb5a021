"""What keeps experts busy, and what it costs: a bias, two auxiliary losses, or nothing.

python scripts/sweep.py --experiment=experiments/balance_kinds/sweep.py --output=runs/balance_kinds
"""

from configs import quickstart
from deepseek_jax.core.override import override
from deepseek_jax.core.precision import Float32
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.layers.moe.balance import BatchBalance, SequenceBalance
from deepseek_jax.optim.balance import SignBias
from deepseek_jax.train.experiment import Experiment

baseline = 'bias'
LOSS, BIAS = 'model.feed_forward.balance', 'balance'


def base() -> Experiment:
  """Returns quickstart without MTP, a little narrower and longer."""
  changes = {
    'name': 'balance_kinds',
    'model.width': 128,
    'model.dense.hidden': 384,
    'model.feed_forward.hidden': 96,
    'model.mtp': None,
    # Not the fastest, which another machine may measure otherwise.
    'precision': Float32(),
    'train_steps': 250,
    'cadence.sample': None,
    'cadence.evaluate': 125,
    'cadence.save': 125,
  }
  return override(quickstart.get_config(), changes)[0]


def variants() -> Sweep:
  """Returns the kinds; each loss at the weight that its paper uses where it stands alone."""
  return product(
    chain(
      bias={LOSS: None, BIAS: SignBias(rate=1e-2)},
      sequence={LOSS: SequenceBalance(weight=1e-2), BIAS: None},
      batch={LOSS: BatchBalance(weight=1e-2), BIAS: None},
      none={LOSS: None, BIAS: None},
    ),
    seeds(3),
  )
