"""The smallest complete run, with attention that a learned gate thins out.

Command: python scripts/train.py --config=configs/tiny_gated.py --workdir=runs/tiny_gated
Hardware, time and result: those of configs/tiny_mla.py, from which only the attention differs.
"""

from configs import tiny_mla
from deepseek_jax.layers.attention.gated import Gated, Share
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  attention = Gated(**tiny_mla.LATENT, keep=Share(share=0.3), block=8, window=8)
  return tiny_mla.with_attention('tiny_gated', attention)
