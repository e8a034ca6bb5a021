"""DeepSeek-V3.2, 672 billion parameters, as published: the sparse stage of its training.

Command: python scripts/train.py --config=configs/v3_2_671b.py --workdir=runs/v3_2
  started on every host, with the weights of the warm-up stage: --config.init_from='InitFrom("…")';
  the text is yours, as in configs/v3_671b.py. The warm-up itself:
  --config.model.attention.stage='WarmUp()' --config.trainable='("*/attention/indexer/*",)'
  --config.optimizer.peak_lr=1e-3 --config.train_steps=1000 --config.data.batch_size=16.
Hardware: as configs/v3_671b.py.
Cost: 943.7 B tokens. It has never been run here.
Expected: the published base model, given the authors' data.

Source: DeepSeek-V3.2-Exp, section 2, and the released configuration.
"""

import dataclasses

from configs import v3_671b
from deepseek_jax.layers.attention.indexer import Indexer
from deepseek_jax.layers.attention.sparse import DSA
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.optim.balance import SignBias
from deepseek_jax.optim.schedule import Constant
from deepseek_jax.train.experiment import Experiment

ROWS, LENGTH = 480, 131_072


def get_config() -> Experiment:
  """Returns the run."""
  base = v3_671b.get_config()
  assert isinstance(base.model, DeepSeekV3)
  assert isinstance(base.balance, SignBias)
  dense = {f.name: getattr(base.model.attention, f.name) for f in dataclasses.fields(v3_671b.MLA)}
  attention = DSA(**dense, top_k=2048, indexer=Indexer(heads=64, dim=128))
  return dataclasses.replace(
    base,
    name='v3_2_671b',
    model=dataclasses.replace(base.model, attention=attention),
    data=dataclasses.replace(base.data, length=LENGTH, batch_size=ROWS),
    optimizer=dataclasses.replace(base.optimizer, peak_lr=7.3e-6),
    schedule=Constant(),
    train_steps=15_000,
    objective=dataclasses.replace(base.objective, mtp_weight=0.1, mtp_schedule=Constant()),
    balance=dataclasses.replace(base.balance, schedule=Constant()),
    microbatches=8,
  )
