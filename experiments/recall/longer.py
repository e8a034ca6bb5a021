"""The model of configs/recall.py learns that rows may be long.

Command:  python scripts/train.py --config=experiments/recall/longer.py --workdir=runs/recall_longer
Hardware: 2 CPU cores. Time: some ten minutes, after configs/recall.py.
"""

from configs import recall
from deepseek_jax.core.override import override
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.init_from import InitFrom


def get_config() -> Experiment:
  """Returns dense training on rows of 2,048 symbols."""
  changes = {
    'name': 'recall_longer',
    'data.length': 2048,
    'data.batch_size': 8,
    'optimizer.peak_lr': 5e-3,
    'train_steps': 400,
    'cadence.evaluate': 100,
    'cadence.evaluate_batches': 8,
    'cadence.save': 100,
    'init_from': InitFrom('runs/recall'),
  }
  return override(recall.get_config(), changes)[0]
