"""The smallest complete run with all parts of DeepSeek-V4.

Two layers of a window, whose tokens are their own routers; then sparse and heavy compression by
turns; four residual lanes, and a prediction of the second token from all of them.

Command: python scripts/train.py --config=configs/tiny_v4.py --workdir=runs/tiny_v4
Hardware: any CPU. Time: seconds of training after a minute of compilation.
Expected: the training loss falls as that of configs/tiny_mla.py does.
"""

import dataclasses
from typing import Any

from configs import tiny_mla
from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.hash import Hash
from deepseek_jax.layers.moe.router.sqrt_softplus import SqrtSoftplus
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.deepseek_v4 import DeepSeekV4
from deepseek_jax.models.mtp import LaneMTP
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  base = tiny_mla.get_config()
  assert isinstance(base.model, DeepSeekV3)
  sizes: dict[str, Any] = {
    'heads': 4,
    'head_dim': 16,
    'rope_dim': 8,
    'query_latent': 24,
    'groups': 2,
    'group_dim': 16,
    'window': 8,
    'rope': RoPE(),
  }
  experts: dict[str, Any] = {'experts': 8, 'top_k': 2, 'hidden': 16, 'limit': 10.0}
  model = DeepSeekV4(
    depth=6,
    width=base.model.width,
    vocab=base.model.vocab,
    first=SharedWindow(**sizes),
    sparse=CSA(**sizes, ratio=4, top_k=4, index_heads=4, index_dim=8),
    heavy=HCA(**sizes, ratio=8),
    feed_forward=MoE(**experts, router=SqrtSoftplus()),
    hashed=MoE(**experts, router=Hash(vocab=base.model.vocab)),
    hashed_layers=2,
    mtp=LaneMTP(attention=SharedWindow(**sizes)),
  )
  return dataclasses.replace(base, name='tiny_v4', model=model)
