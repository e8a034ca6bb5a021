"""Captions of drawings: one MoE decoder that reads patches beside words, on two CPU cores.

Command:  python scripts/train.py --config=configs/image_caption.py --workdir=runs/captions
          python scripts/evaluate.py --workdir=runs/captions
Hardware: 2 CPU cores, 2 GB of memory.
Time:     about 11 minutes, from 1.5 s of processor time a step; not measured on a quiet machine.
Result:   held-out captions need 1.90 nats a token with their own picture and 2.13 with another's;
          keyword F1 0.32, where the best single caption has 0.24
          (experiments/image_caption/README.md).
"""

from deepseek_jax.data.captions import ImageCaptions
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.encoders.patch import Patch2D
from deepseek_jax.layers.encoders.projection import SeparateProjection
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.multimodal import Multimodal
from deepseek_jax.optim.balance import SignBias
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.train.experiment import Cadence, Experiment


def get_config() -> Experiment:
  """Returns the run."""
  return Experiment(
    name='image_caption',
    model=Multimodal(
      projection=SeparateProjection(),
      text=DeepSeekV3(
        depth=4,
        width=192,
        vocab=8192,
        attention=MLA(heads=4, nope_dim=32, rope_dim=16, value_dim=48, latent=64),
        dense=SwiGLU(hidden=512),
        dense_layers=1,
        feed_forward=MoE(experts=16, top_k=2, hidden=128),
      ),
      image=Patch2D(
        width=128,
        depth=3,
        attention=Bidirectional(heads=4, head_dim=32),
        feed_forward=SwiGLU(hidden=320),
      ),
    ),
    data=ImageCaptions(slots=16, length=52, batch_size=32),
    optimizer=AdamW(peak_lr=2e-3),
    schedule=WarmupStableDecay(warmup_steps=40, decay_fraction=0.5, final=0.05),
    train_steps=800,
    # Ten times DeepSeek's rate, for a run a hundred thousand times shorter.
    balance=SignBias(rate=1e-2),
    cadence=Cadence(log=10, evaluate=200, evaluate_batches=6, sample=400, save=200),
  )
