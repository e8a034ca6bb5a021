"""A model that learnt rows of 2,048 bytes: how far does each kind of attention read?

python scripts/train.py --config=experiments/window_reach/dense.py --workdir=runs/reach_dense
python scripts/sweep.py --experiment=experiments/window_reach/sweep.py --output=runs/reach
python -m experiments.window_reach.reach --runs=runs/reach
"""

from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.layers.attention.recurrent import Recurrent, Slots
from deepseek_jax.layers.attention.top_k import TopK
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.init_from import InitFrom
from experiments.attention_kinds.sweep import ATTENTION, LATENT
from experiments.window_reach import dense

baseline = 'all'


def base() -> Experiment:
  """Returns the dense model, which goes on in rows four times as long."""
  changes = {
    'name': 'window_reach',
    'data.length': 2048,
    'data.batch_size': 2,
    'optimizer.peak_lr': 1e-3,
    'train_steps': 60,
    'cadence.log': 10,
    'cadence.evaluate': 60,
    'cadence.save': 60,
    'init_from': InitFrom('runs/reach_dense'),
  }
  return override(dense.get_config(), changes)[0]


def variants() -> Sweep:
  """Returns all of the past; windows of an eighth of a row; and other ways to see less."""
  kinds = {
    'window_256': Window(**LATENT, size=256, sinks=4),
    'no_sinks_256': Window(**LATENT, size=256, sinks=0),
    'recurrent_256': Recurrent(**LATENT, size=256, memory=Slots(text=16)),
    'top_k_32': TopK(**LATENT, top_k=32),
  }
  changed = {name: {ATTENTION: kind} for name, kind in kinds.items()}
  return product(chain(all={}, **changed), seeds(3))
