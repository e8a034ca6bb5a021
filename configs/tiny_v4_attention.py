"""The smallest complete run with all attention kinds of DeepSeek-V4, and its residual.

Two layers of a window, then sparse and heavy compression by turns.

Command: python scripts/train.py --config=configs/tiny_v4_attention.py --workdir=runs/tiny_v4
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
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.deepseek_v4 import DeepSeekV4
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
  model = DeepSeekV4(
    depth=6,
    width=base.model.width,
    vocab=base.model.vocab,
    first=SharedWindow(**sizes),
    sparse=CSA(**sizes, ratio=4, top_k=4, index_heads=4, index_dim=8),
    heavy=HCA(**sizes, ratio=8),
    feed_forward=base.model.feed_forward,
  )
  return dataclasses.replace(base, name='tiny_v4_attention', model=model)
