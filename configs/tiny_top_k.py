"""The smallest complete run, with each token attending to the 8 that it scores highest.

Command: python scripts/train.py --config=configs/tiny_top_k.py --workdir=runs/tiny_top_k
Hardware, time and result: those of configs/tiny_mla.py, from which only the attention differs.
"""

from configs import tiny_mla
from deepseek_jax.layers.attention.top_k import TopK
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  attention = TopK(**tiny_mla.LATENT, top_k=8)
  return tiny_mla.with_attention('tiny_top_k', attention)
