"""Pictures and captions in two towers: does the shared projection beat a plain pair of towers?

python scripts/sweep.py --experiment=experiments/image_text/sweep.py --output=runs/pairs
"""

from configs import image_text
from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.layers.encoders.projection import SeparateProjection
from deepseek_jax.train.experiment import Experiment

baseline = 'plain'


def base() -> Experiment:
  """Returns two towers as in CLIP: a projection of their own, and no loss but the contrastive.

  The text's tower keeps its experts, so that parameters are equal but for the projection.
  """
  changes = {
    'name': 'image_text',
    'train_steps': 400,
    'cadence.evaluate': 200,
    'cadence.save': 200,
    'model.projection': SeparateProjection(),
    'model.text_weight': 0.0,
  }
  return override(image_text.get_config(), changes)[0]


def variants() -> Sweep:
  """Returns the plain pair, one with the captions' own loss too, and that with one projection."""
  model = image_text.get_config().model
  ours = {'model.projection': model.projection, 'model.text_weight': model.text_weight}
  captions = {'model.text_weight': model.text_weight}
  return product(chain(plain={}, captions=captions, shared=ours), seeds(3))
