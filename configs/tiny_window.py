"""The smallest complete run, with sliding-window attention and sinks.

Command: python scripts/train.py --config=configs/tiny_window.py --workdir=runs/tiny_window
Hardware, time and result: those of configs/tiny_mla.py, from which only the attention differs.
"""

from configs import tiny_mla
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  attention = Window(**tiny_mla.LATENT, size=16, sinks=2)
  return tiny_mla.with_attention('tiny_window', attention)
