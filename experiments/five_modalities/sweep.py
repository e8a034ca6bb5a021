"""Five modalities in one model, and each of four alone in the same model.

python scripts/sweep.py --experiment=experiments/five_modalities/sweep.py --output=runs/alone
"""

from configs import five_modalities
from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.data.media.plan import Packed
from deepseek_jax.train.experiment import Experiment

baseline = 'together'

STEPS = 500


def base() -> Experiment:
  """Returns all modalities in one model, for half of its steps."""
  changes = {
    'name': 'five_modalities',
    'train_steps': STEPS,
    'cadence.evaluate': STEPS // 2,
    'cadence.save': STEPS // 2,
  }
  return override(five_modalities.get_config(), changes)[0]


def variants() -> Sweep:
  """Returns one for each medium alone: a quarter of the steps, so as many documents of it.

  Decoder, encoder and projection are the same, and so the parameters that are active for a token.
  """
  sources = dict(zip(('image', 'video', 'sound', 'points'), base().data.source.shares, strict=True))
  alone = {}
  for kind, share in sources.items():
    others = {f'model.{other}': None for other in sources if other != kind}
    alone[f'{kind}_alone'] = others | {
      'data.source': share.source,
      'data.layout': Packed(**{kind: 6}),
      'train_steps': STEPS // len(sources),
      'schedule.warmup_steps': 20,
    }
  return product(chain(together={}, **alone), seeds(1))
