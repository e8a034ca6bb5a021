"""The smallest complete run of V2: a softmax router that is limited to groups, YaRN, no MTP.

Command: python scripts/train.py --config=configs/tiny_v2.py --workdir=runs/tiny_v2
Hardware, time and result: those of configs/tiny_mla.py.
"""

from configs import tiny_mla
from deepseek_jax.core.override import override
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.rope import RoPE, YaRN
from deepseek_jax.layers.moe.balance import ExpertBalance
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.softmax import Softmax
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  # Short rows make all frequencies matter.
  yarn = YaRN(factor=40.0, original_length=64, mscale=0.707, mscale_all=0.707)
  changes = {
    'name': 'tiny_v2',
    'model.attention': MLA(**tiny_mla.LATENT, rope=RoPE(theta=100.0, yarn=yarn)),
    'model.feed_forward': MoE(
      experts=8,
      top_k=2,
      hidden=16,
      shared=2,
      router=Softmax(groups=4, kept_groups=2, scale=4.0),
      balance=ExpertBalance(weight=1e-3),
    ),
    'model.mtp': None,
    'balance': None,
  }
  return override(tiny_mla.get_config(), changes)[0]
