"""Kimi K2, 1.04 trillion parameters: the shape of DeepSeek-V3 with more experts and fewer heads.

Command: python scripts/train.py --config=configs/kimi_k2.py --workdir=runs/kimi_k2
  started on every host; text and tokenizer are yours, as in configs/v2_lite.py.
Hardware: 2,048 accelerators of 80 GB or more. It has never been run here.
Expected: a model of that shape. The recipe is that of configs/v3_671b.py, not the authors'.

Source: Kimi K2, arXiv 2507.20534, table 2, and the released configuration.
"""

from configs import v3_671b
from deepseek_jax.core.override import override
from deepseek_jax.data.tokenizer import BPE
from deepseek_jax.layers.attention.rope import RoPE, YaRN
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.train.experiment import Experiment


def get_config() -> Experiment:
  """Returns the run."""
  changes = {
    'name': 'kimi_k2',
    'model.vocab': 163_840,
    'model.attention.heads': 64,
    'model.attention.rope': RoPE(theta=50_000.0, yarn=YaRN(factor=32.0, original_length=4096)),
    'model.dense_layers': 1,
    'model.feed_forward.experts': 384,
    'model.feed_forward.router': Sigmoid(scale=2.827),
    'model.mtp': None,
    'data.tokenizer': BPE(),
    # So many that 2,048 devices share them evenly.
    'data.batch_size': 16_384,
    'microbatches': 8,
    'mesh': MeshConfig(data=64, expert=32),
  }
  return override(v3_671b.get_config(), changes)[0]
