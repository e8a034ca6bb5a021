"""The smallest complete run, with attention to the tokens that an indexer selects.

Command: python scripts/train.py --config=configs/tiny_dsa.py --workdir=runs/tiny_dsa
Hardware, time and result: those of configs/tiny_mla.py, from which only the attention differs.
"""

import dataclasses

from configs import tiny_mla
from deepseek_jax.layers.attention.indexer import Indexer
from deepseek_jax.layers.attention.sparse import DSA
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  base = tiny_mla.get_config()
  assert isinstance(base.model, DeepSeekV3)
  attention = DSA(
    heads=4,
    nope_dim=8,
    rope_dim=4,
    value_dim=8,
    latent=16,
    query_latent=24,
    top_k=16,
    indexer=Indexer(heads=4, dim=8),
  )
  return dataclasses.replace(
    base, name='tiny_dsa', model=dataclasses.replace(base.model, attention=attention)
  )
