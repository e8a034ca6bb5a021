"""A scene and a sound in one document, each with its caption: what do dynamic weights do?

python scripts/sweep.py --experiment=experiments/fusion_weights/sweep.py --output=runs/joined
python -m experiments.fusion_weights.measure --runs=runs/joined
"""

import dataclasses

from configs import five_modalities, visual_questions
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.data.media.made import Made
from deepseek_jax.data.media.mixture import Joined, Mixture, Share
from deepseek_jax.data.media.plan import Marked
from deepseek_jax.data.media.rows import MediaCorpus, Slots
from deepseek_jax.data.media.scene import Scenes
from deepseek_jax.data.media.sound import Sounds
from deepseek_jax.layers.attention.cross import OrderedCross
from deepseek_jax.train.experiment import Cadence, Experiment

baseline = 'one_softmax'

SCENES = Scenes(most=2, made=Made(train=20_000, heldout=300))
SOUNDS = Sounds(rate=8000, seconds=1.6, made=Made(train=20_000, heldout=300))


def base() -> Experiment:
  """Returns words that attend to all media in one softmax.

  Documents are a scene then a sound, a sound then a scene, and each of them alone.
  """
  fusion = visual_questions.get_config('fusion')
  cross = fusion.model.cross
  shares = (
    Share(source=Joined(sources=(SCENES, SOUNDS))),
    Share(source=Joined(sources=(SOUNDS, SCENES))),
    Share(source=SCENES, weight=0.5),
    Share(source=SOUNDS, weight=0.5),
  )
  return dataclasses.replace(
    fusion,
    name='fusion_weights',
    model=dataclasses.replace(
      fusion.model,
      sound=five_modalities.get_config().model.sound,
      cross=OrderedCross(heads=cross.heads, head_dim=cross.head_dim, slots=96),
    ),
    data=MediaCorpus(
      source=Mixture(shares=shares),
      slots=Slots(image=16, sound=16),
      layout=Marked(image=3, sound=3),
      length=112,
      batch_size=16,
    ),
    train_steps=400,
    cadence=Cadence(log=10, evaluate=200, evaluate_batches=6, save=200),
  )


def variants() -> Sweep:
  """Returns one softmax over all that is shown, and one for each modality with dynamic weights."""
  return product(chain(one_softmax={}, fusion={'model.cross': _fusion()}), seeds(2))


def _fusion():
  """The weighed kind, of the same heads."""
  cross = visual_questions.get_config('fusion').model.cross
  return dataclasses.replace(cross, slots=96)
