"""The smallest complete run, with full latent attention: for tests, and to see that things work.

Command: python scripts/train.py --config=configs/tiny_mla.py --workdir=runs/tiny_mla
Hardware: any CPU. Time: seconds of training after half a minute of compilation.
Expected: the training loss falls from 5.7 nats a byte; 20 steps teach little more than which
bytes are frequent.
"""

import dataclasses
from typing import Any

from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.mtp import MTP
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.train.experiment import Cadence, Experiment

LATENT: dict[str, Any] = {
  'heads': 4,
  'nope_dim': 8,
  'rope_dim': 4,
  'value_dim': 8,
  'latent': 16,
  'query_latent': 24,
}
"""Sizes of the kinds that derive from MLA."""


def with_attention(name: str, attention: Any) -> Experiment:
  """Returns the run with another kind of attention."""
  base = get_config()
  model = dataclasses.replace(base.model, attention=attention)
  return dataclasses.replace(base, name=name, model=model)


def get_config() -> Experiment:
  """Returns the run."""
  return Experiment(
    name='tiny_mla',
    model=DeepSeekV3(
      depth=3,
      width=32,
      # 259 bytes and special tokens, rounded up so that 8 devices can share them.
      vocab=264,
      attention=MLA(**LATENT),
      dense=SwiGLU(hidden=64),
      dense_layers=1,
      feed_forward=MoE(experts=8, top_k=2, hidden=16, shared=1),
      mtp=MTP(depth=1),
    ),
    data=TextCorpus(tokenizer=Bytes(), length=64, batch_size=8),
    optimizer=AdamW(peak_lr=1e-2),
    schedule=WarmupStableDecay(warmup_steps=4, decay_fraction=0.25),
    train_steps=20,
    cadence=Cadence(log=5, evaluate_batches=2),
  )
