"""Questions about pictures: which way for text and pictures to meet answers best?

python scripts/sweep.py --experiment=experiments/visual_questions/sweep.py --output=runs/questions
"""

import dataclasses

import numpy as np

from configs import visual_questions
from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.data.media.question import Asked, Questions
from deepseek_jax.data.split import Split
from deepseek_jax.train.experiment import Experiment

baseline = 'concatenated'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unseen(Questions):
  """The same questions, with a grey picture for each: words are all there is.

  Attributes:
    about: as in `Questions`, and so are the others.
    least: figures in a picture, at least.
    most: at most.
    side: S, pixels of a side.
    layout: what is read first.
    made: how many questions, and which are held out.
  """

  def paint(self, scene: Asked, rng: np.random.Generator, split: Split) -> list[np.ndarray]:
    """Nothing of a picture."""
    del scene, rng, split
    return [np.full((self.side, self.side, 3), 127, np.uint8)]


def base() -> Experiment:
  """Returns the decoder that reads pictures among its words, for 750 steps."""
  changes = {
    'name': 'visual_questions',
    'train_steps': 750,
    'cadence.evaluate': 250,
    'cadence.save': 250,
  }
  return override(visual_questions.get_config('decoder'), changes)[0]


def variants() -> Sweep:
  """Returns the ways to join, each with the same questions in the same order."""
  joined = {join: visual_questions.get_config(join) for join in ('dual', 'fusion')}
  marked = joined['dual'].data
  beside = {'data.layout': marked.layout, 'data.length': marked.length}
  source = base().data.source
  fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
  return product(
    chain(
      concatenated={},
      dual_stream={'model': joined['dual'].model, **beside},
      fusion={'model': joined['fusion'].model, **beside},
      words_only={'data.source': Unseen(**fields)},
    ),
    seeds(3),
  )
