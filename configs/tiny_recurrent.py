"""The smallest complete run, with attention inside segments and a recurrent memory.

Command: python scripts/train.py --config=configs/tiny_recurrent.py --workdir=runs/tiny_recurrent
Hardware, time and result: those of configs/tiny_mla.py, from which only the attention differs.
"""

from configs import tiny_mla
from deepseek_jax.layers.attention.recurrent import Recurrent, Slots
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  # Four segments in a row of 64.
  attention = Recurrent(**tiny_mla.LATENT, size=16, memory=Slots(text=4))
  return tiny_mla.with_attention('tiny_recurrent', attention)
