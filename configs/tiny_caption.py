"""The smallest complete run on pictures: for tests, and to see that things work.

Command: python scripts/train.py --config=configs/tiny_caption.py --workdir=runs/tiny_caption
Hardware: any CPU. Time: seconds of training after half a minute of compilation.
Expected: the training loss falls from 5.6 nats a byte; 20 steps teach no more than how captions
begin.
"""

from deepseek_jax.data.captions import ImageCaptions
from deepseek_jax.data.drawing import OpenClipart
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.encoders.patch import Patch2D
from deepseek_jax.layers.encoders.projection import SeparateProjection
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.multimodal import Multimodal
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.train.experiment import Cadence, Experiment


def get_config() -> Experiment:
  """Returns the run."""
  return Experiment(
    name='tiny_caption',
    model=Multimodal(
      projection=SeparateProjection(),
      text=DeepSeekV3(
        depth=3,
        width=32,
        # 259 bytes and special tokens, rounded up so that 8 devices can share them.
        vocab=264,
        attention=MLA(heads=4, nope_dim=8, rope_dim=4, value_dim=8, latent=16, query_latent=24),
        dense=SwiGLU(hidden=64),
        dense_layers=1,
        feed_forward=MoE(experts=8, top_k=2, hidden=16, shared=1),
      ),
      image=Patch2D(
        width=24,
        depth=2,
        patch=16,
        attention=Bidirectional(heads=4, head_dim=8),
        feed_forward=SwiGLU(hidden=40),
      ),
    ),
    data=ImageCaptions(
      source=OpenClipart(folders=('food', 'plants')),
      tokenizer=Bytes(),
      slots=4,
      length=96,
      batch_size=8,
    ),
    optimizer=AdamW(peak_lr=1e-2),
    schedule=WarmupStableDecay(warmup_steps=4, decay_fraction=0.25),
    train_steps=20,
    cadence=Cadence(log=5, evaluate_batches=2),
  )
