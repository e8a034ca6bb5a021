"""DeepSeek-V4-Pro, 1.6 trillion parameters, as published: pre-training on 4,096-token rows.

Command: python scripts/train.py --config=configs/v4_pro.py --workdir=runs/v4_pro
  started on every host; the text is yours: --config.data.source='TextFiles("…")'.
Hardware: 2,048 accelerators of 80 GB or more, as 64 (data) × 32 (expert).
Cost: 33 T tokens. It has never been run here.
Expected: the published base model, given the authors' data and their stages of longer rows.

What differs from the report: as in configs/v4_flash.py; a batch has 92.3 M tokens, where theirs has
94.4 M, so that 2,048 devices share it evenly.

Source: DeepSeek-V4, arXiv 2606.19348, sections 2 and 4, and the released configuration.
"""

import dataclasses
from typing import Any

from configs import v4_flash
from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.hash import Hash
from deepseek_jax.layers.moe.router.sqrt_softplus import SqrtSoftplus
from deepseek_jax.models.deepseek_v4 import DeepSeekV4
from deepseek_jax.models.mtp import LaneMTP
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.train.experiment import Experiment

ROWS = 22_528


def get_config() -> Experiment:
  """Returns the run."""
  base = v4_flash.get_config()
  assert isinstance(base.model, DeepSeekV4)
  assert isinstance(base.model.feed_forward, MoE)
  sizes: dict[str, Any] = {
    'heads': 128,
    'head_dim': 512,
    'rope_dim': 64,
    'query_latent': 1536,
    'groups': 16,
    'group_dim': 1024,
    'window': 128,
  }
  heavy = HCA(**sizes, ratio=128)
  routed = dataclasses.replace(
    base.model.feed_forward, experts=384, hidden=3072, router=SqrtSoftplus(scale=2.5)
  )
  model = dataclasses.replace(
    base.model,
    depth=61,
    width=7168,
    first=heavy,
    sparse=CSA(**sizes, ratio=4, top_k=1024, index_heads=64, index_dim=128),
    heavy=heavy,
    feed_forward=routed,
    hashed=dataclasses.replace(routed, router=Hash(vocab=v4_flash.VOCAB, scale=2.5)),
    mtp=LaneMTP(attention=SharedWindow(**sizes, rope=RoPE(theta=10_000.0))),
  )
  return dataclasses.replace(
    base,
    name='v4_pro',
    model=model,
    data=dataclasses.replace(base.data, batch_size=ROWS),
    optimizer=dataclasses.replace(base.optimizer, peak_lr=2e-4),
    train_steps=round(33e12 / (ROWS * v4_flash.LENGTH)),
    microbatches=11,
    mesh=MeshConfig(data=64, expert=32),
  )
