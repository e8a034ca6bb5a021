"""The smallest complete run, with grouped-query attention.

Command: python scripts/train.py --config=configs/tiny_mha.py --workdir=runs/tiny_mha
Hardware, time and result: those of configs/tiny_mla.py, from which only the attention differs.
"""

from configs import tiny_mla
from deepseek_jax.layers.attention.mha import MHA
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  # Four key heads, so that the mesh of four that heads are spread over divides them.
  attention = MHA(heads=8, kv_heads=4, head_dim=8, norm=RMSNorm())
  return tiny_mla.with_attention('tiny_mha', attention)
