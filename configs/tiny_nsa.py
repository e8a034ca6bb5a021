"""The smallest complete run, with native sparse attention.

Command: python scripts/train.py --config=configs/tiny_nsa.py --workdir=runs/tiny_nsa
Hardware, time and result: those of configs/tiny_mla.py, from which only the attention differs.
"""

from configs import tiny_mla
from deepseek_jax.layers.attention.nsa import NSA
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  # Four key heads, so that the mesh of four that heads are spread over divides them.
  attention = NSA(
    heads=8,
    kv_heads=4,
    head_dim=8,
    value_dim=8,
    span=8,
    stride=4,
    block=8,
    blocks=3,
    local=1,
    window=16,
  )
  return tiny_mla.with_attention('tiny_nsa', attention)
