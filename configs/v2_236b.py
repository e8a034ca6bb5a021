"""DeepSeek-V2, 236 billion parameters, as published: pre-training on 4,096-token rows.

Command: python scripts/train.py --config=configs/v2_236b.py --workdir=runs/v2
  started on every host; text and tokenizer are yours, as in configs/v2_lite.py.
Hardware: 512 accelerators of 80 GB or more, as 64 (data) × 8 (expert).
Cost: 8.1 T tokens; the authors report 172.8 K H800 hours a trillion. It has never been run here.
Expected: the published base model, given the authors' data.

What differs from the paper: its batch grows from 2,304 to 9,216 rows over the first 225 B tokens,
ours is 9,216 throughout; it drops tokens beyond an even share of a device, ours beyond twice that;
YaRN is on from the start; documents do not see each other.

Source: DeepSeek-V2, arXiv 2405.04434, section 3.1, and the released configuration.
"""

import dataclasses

from configs import v2_lite
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.balance import (
  CommunicationBalance,
  DeviceBalance,
  ExpertBalance,
  Several,
)
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.softmax import Softmax
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.optim.schedule import MultiStep
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT
from deepseek_jax.train.experiment import Experiment

ROWS = 9216
DEVICES = 8
"""That experts are balanced over."""


def get_config() -> Experiment:
  """Returns the run."""
  base = v2_lite.get_config()
  losses = (
    ExpertBalance(weight=3e-3),
    DeviceBalance(devices=DEVICES, weight=0.05),
    CommunicationBalance(devices=DEVICES, kept=3, weight=0.02),
  )
  return dataclasses.replace(
    base,
    name='v2_236b',
    model=DeepSeekV3(
      depth=60,
      width=5120,
      vocab=v2_lite.VOCAB,
      attention=MLA(
        heads=128,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        latent=512,
        query_latent=1536,
        rope=v2_lite.ROPE,
      ),
      dense=SwiGLU(hidden=12_288),
      dense_layers=1,
      feed_forward=MoE(
        experts=160,
        top_k=6,
        hidden=1536,
        shared=2,
        router=Softmax(groups=8, kept_groups=3, scale=16.0),
        balance=Several(losses=losses),
        dispatch=AllToAll(bound=2.0),
      ),
    ),
    data=dataclasses.replace(base.data, batch_size=ROWS),
    optimizer=dataclasses.replace(base.optimizer, peak_lr=2.4e-4, moments='bfloat16'),
    schedule=MultiStep(warmup_steps=2000, boundaries=(0.6, 0.9), factor=0.316),
    train_steps=round(8.1e12 / (ROWS * v2_lite.LENGTH)),
    microbatches=18,
    mesh=MeshConfig(data=64, expert=8),
    rules=EXPERT,
  )
