"""The dense model that sparse attention is put on.

Command:  python scripts/train.py --config=experiments/indexer_stages/dense.py --workdir=runs/dense
Hardware: 2 CPU cores. Time: a few minutes.
"""

from deepseek_jax.core.override import override
from deepseek_jax.train.experiment import Experiment
from experiments.attention_kinds import sweep as attention_kinds


def get_config() -> Experiment:
  """Returns the baseline of `attention_kinds`, for more steps."""
  changes = {
    'name': 'dense',
    'train_steps': 300,
    'cadence.evaluate': 150,
    'cadence.save': 150,
  }
  return override(attention_kinds.base(), changes)[0]
