"""Questions about pictures: which way for text and pictures to meet answers best?

python scripts/sweep.py --experiment=experiments/visual_questions/sweep.py --output=runs/questions
"""

from configs import visual_questions
from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.train.experiment import Experiment

baseline = 'concatenated'


def base() -> Experiment:
  """Returns the decoder that reads pictures among its words, for 600 steps."""
  changes = {
    'name': 'visual_questions',
    'train_steps': 600,
    'cadence.evaluate': 300,
    'cadence.save': 300,
  }
  return override(visual_questions.get_config('decoder'), changes)[0]


def variants() -> Sweep:
  """Returns the ways to join, each with the same questions in the same order."""
  joined = {join: visual_questions.get_config(join) for join in ('dual', 'fusion')}
  marked = joined['dual'].data
  beside = {'data.layout': marked.layout, 'data.length': marked.length}
  return product(
    chain(
      concatenated={},
      dual_stream={'model': joined['dual'].model, **beside},
      fusion={'model': joined['fusion'].model, **beside},
    ),
    seeds(3),
  )
