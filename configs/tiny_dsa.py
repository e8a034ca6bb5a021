"""The smallest complete run, with attention to the tokens that an indexer selects.

Command: python scripts/train.py --config=configs/tiny_dsa.py --workdir=runs/tiny_dsa
Hardware, time and result: those of configs/tiny_mla.py, from which only the attention differs.
"""

from configs import tiny_mla
from deepseek_jax.layers.attention.indexer import Indexer
from deepseek_jax.layers.attention.sparse import DSA
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  attention = DSA(**tiny_mla.LATENT, top_k=16, indexer=Indexer(heads=4, dim=8))
  return tiny_mla.with_attention('tiny_dsa', attention)
