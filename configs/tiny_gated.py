"""The smallest complete run, with attention that a learned gate thins out.

Command: python scripts/train.py --config=configs/tiny_gated.py --workdir=runs/tiny_gated
Hardware, time and result: those of configs/tiny_mla.py, from which only the attention differs.
"""

import dataclasses

from configs import tiny_mla
from deepseek_jax.layers.attention.gated import Gated, Share
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  base = tiny_mla.get_config()
  assert isinstance(base.model, DeepSeekV3)
  attention = Gated(
    heads=4,
    nope_dim=8,
    rope_dim=4,
    value_dim=8,
    latent=16,
    query_latent=24,
    keep=Share(share=0.3),
    block=8,
    window=8,
  )
  return dataclasses.replace(
    base, name='tiny_gated', model=dataclasses.replace(base.model, attention=attention)
  )
