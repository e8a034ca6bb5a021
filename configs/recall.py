"""A small dense model that learns to look things up: values to be found again by their keys.

Command:  python scripts/train.py --config=configs/recall.py --workdir=runs/recall
Hardware: 2 CPU cores, 1 GB of memory.
Time:     ten minutes.
Expected: for some 1,400 steps the loss lingers below the 1.4 nats of a guess among the four values
of a row; within 300 more it falls to nothing, when two heads have found each other.

Few symbols are what makes it so quick: with 32 keys and 32 values, nothing of the kind happened in
2,000 steps.
"""

import dataclasses

from configs import tiny_mla
from deepseek_jax.data.recall import MultiQuery, Recall
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.optim.muon import Muon
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.train.experiment import Cadence, Experiment


def get_config() -> Experiment:
  """Returns the run."""
  base = tiny_mla.get_config()
  assert isinstance(base.model, DeepSeekV3)
  model = dataclasses.replace(
    base.model,
    depth=2,
    width=64,
    # 8 keys, 8 values, 16 other symbols and 3 special ones, rounded up.
    vocab=40,
    attention=MLA(heads=4, nope_dim=16, rope_dim=16, value_dim=16, latent=64),
    dense=SwiGLU(hidden=128),
    dense_layers=2,
    mtp=None,
  )
  return dataclasses.replace(
    base,
    name='recall',
    model=model,
    data=Recall(
      task=MultiQuery(pairs=4, questions=12, power=1.0),
      keys=8,
      values=8,
      noise=16,
      length=33,
      batch_size=128,
    ),
    optimizer=Muon(peak_lr=1e-2),
    schedule=WarmupStableDecay(warmup_steps=20, decay_fraction=0.2),
    train_steps=2500,
    balance=None,
    cadence=Cadence(log=50, evaluate=500, evaluate_batches=2, save=500),
  )
