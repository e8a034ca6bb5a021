"""The model of configs/recall.py learns that pairs may lie anywhere, and that rows may be long.

Command:  for length in 65 512 2048; do
            python scripts/train.py --config="experiments/recall/longer.py(length=$length)" \
              --workdir=runs/recall_$length
          done
Hardware: 2 CPU cores. Time: some ten minutes for all three, after configs/recall.py.
Expected: nearly all held-out answers are right after each.
"""

from typing import Any

from configs import recall
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override
from deepseek_jax.data.recall import Scattered
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.init_from import InitFrom

STAGES: dict[int, dict[str, Any]] = {
  65: {'batch_size': 64, 'steps': 800, 'peak_lr': 1e-2, 'after': 'recall'},
  512: {'batch_size': 16, 'steps': 300, 'peak_lr': 5e-3, 'after': 'recall_65'},
  2048: {'batch_size': 8, 'steps': 150, 'peak_lr': 5e-3, 'after': 'recall_512'},
}
"""By symbols in a row. Each begins with what the last one learnt: from rows of 33 straight to rows
of 2,048 nothing was learnt in 280 steps."""
PAIRS = 8
"""Of a row, each asked for once: an answer that has been given already is no help."""


def get_config(length: int = 65) -> Experiment:
  """Returns dense training on rows of `length` symbols.

  Raises:
    ConfigError: there is no such stage.
  """
  if length not in STAGES:
    raise ConfigError(f'length: expected one of {", ".join(map(str, STAGES))}, found {length}')
  stage = STAGES[length]
  steps = stage['steps']
  changes = {
    'name': f'recall_{length}',
    'data.task': Scattered(pairs=PAIRS, questions=PAIRS),
    'data.length': length,
    'data.batch_size': stage['batch_size'],
    'data.heldout_rows': 64,
    'optimizer.peak_lr': stage['peak_lr'],
    'train_steps': steps,
    'cadence.log': steps // 8,
    'cadence.evaluate': steps // 2,
    'cadence.evaluate_batches': None,
    'cadence.save': steps // 2,
    'init_from': InitFrom(f'runs/{stage["after"]}'),
  }
  return override(recall.get_config(), changes)[0]
