r"""The dense model that ways to see less are put on: bytes, in short rows.

Command:  python scripts/train.py --config=experiments/window_reach/dense.py \
            --workdir=runs/reach_dense
Hardware: 2 CPU cores. Time: ten minutes.
"""

from deepseek_jax.core.override import override
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.train.experiment import Experiment
from experiments.attention_kinds import sweep as attention_kinds


def get_config() -> Experiment:
  """Returns the model of `attention_kinds` on bytes, so that documents are long."""
  changes = {
    'name': 'reach_dense',
    'model.vocab': 264,
    'data.tokenizer': Bytes(),
    'data.length': 512,
    'data.batch_size': 8,
    'train_steps': 1000,
    'cadence.log': 50,
    'cadence.evaluate': 500,
    'cadence.save': 500,
  }
  return override(attention_kinds.base(), changes)[0]
