"""DeepSeek-V3.2, 672 billion parameters, as published: the sparse stage of its training.

Command: python scripts/train.py --config=configs/v3_2_671b.py --workdir=runs/v3_2
  started on every host, with the weights of the warm-up stage: --config.init_from='InitFrom("…")';
  the text is yours, as in configs/v3_671b.py. The warm-up itself:
  --config.model.attention.stage='WarmUp()' --config.trainable='("*/attention/indexer/*",)'
  --config.optimizer.peak_lr=1e-3 --config.train_steps=1000 --config.data.batch_size=16
  --config.mesh='MeshConfig(expert=16)' --config.microbatches=1.
Hardware: 480 accelerators, one row each, as 30 (data) × 16 (expert); none that there are: what
  61 layers keep of 131,072 tokens is 114 GB in bfloat16 even if all else is made again. It waits
  for rows that are spread over devices.
Cost: 943.7 B tokens. It has never been run here.
Expected: the published base model, given the authors' data.

Source: DeepSeek-V3.2-Exp, section 2, and the released configuration.
"""

from configs import v3_671b
from deepseek_jax.core.override import override
from deepseek_jax.optim.schedule import Constant
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.train.experiment import Experiment

ROWS, LENGTH = 480, 131_072


def get_config() -> Experiment:
  """Returns the run."""
  changes = {
    'name': 'v3_2_671b',
    # Its other sizes are those of V3.
    'model.attention': 'DSA(top_k=2048, indexer=Indexer(heads=64, dim=128))',
    'data.length': LENGTH,
    'data.batch_size': ROWS,
    'optimizer.peak_lr': 7.3e-6,
    'schedule': Constant(),
    'train_steps': 15_000,
    'objective.mtp_weight': 0.1,
    'objective.mtp_schedule': Constant(),
    'balance.schedule': Constant(),
    'microbatches': 1,
    'mesh': MeshConfig(data=30, expert=16),
  }
  return override(v3_671b.get_config(), changes)[0]
