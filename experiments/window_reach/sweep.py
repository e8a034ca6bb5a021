"""Trained on rows of 2,048 bytes: how far does each kind of attention read?

python scripts/sweep.py --experiment=experiments/window_reach/sweep.py --output=runs/reach
python -m experiments.window_reach.reach --runs=runs/reach
"""

from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.layers.attention.recurrent import Recurrent, Slots
from deepseek_jax.layers.attention.top_k import TopK
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.train.experiment import Experiment
from experiments.attention_kinds import sweep as attention_kinds
from experiments.attention_kinds.sweep import ATTENTION, LATENT

baseline = 'all'


def base() -> Experiment:
  """Returns the model of `attention_kinds` on bytes, so that documents are long."""
  changes = {
    'name': 'window_reach',
    'model.vocab': 264,
    'data.tokenizer': Bytes(),
    'data.length': 2048,
    'data.batch_size': 2,
    'train_steps': 400,
    'cadence.evaluate': 200,
    'cadence.save': 200,
  }
  return override(attention_kinds.base(), changes)[0]


def variants() -> Sweep:
  """Returns all of the past; windows of an eighth and of half a row; and other ways to see less."""
  kinds = {
    'window_256': Window(**LATENT, size=256, sinks=4),
    'no_sinks_256': Window(**LATENT, size=256, sinks=0),
    'window_1024': Window(**LATENT, size=1024, sinks=4),
    'recurrent_256': Recurrent(**LATENT, size=256, memory=Slots(text=16)),
    'top_k_32': TopK(**LATENT, top_k=32),
  }
  changed = {name: {ATTENTION: kind} for name, kind in kinds.items()}
  return product(chain(all={}, **changed), seeds(3))
