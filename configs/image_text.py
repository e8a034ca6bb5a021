"""Pictures and their captions in two towers, each to find the other's match.

Drawings and made scenes, one pair a row; all other pairs of the batch, on all devices, are the
negatives. `text_weight` is what next-token prediction of the captions adds to the text's tower.

Command:  python scripts/train.py --config=configs/image_text.py --workdir=runs/pairs
          python scripts/evaluate.py --workdir=runs/pairs
Hardware: 2 CPU cores.
Time:     not measured on a quiet machine.
"""

from deepseek_jax.data.media.presets import IMAGE_TEXT
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.rope import Axial
from deepseek_jax.layers.encoders.patch import Patch2D
from deepseek_jax.layers.encoders.projection import SharedProjection
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.contrastive import Contrastive
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.optim.balance import SignBias
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.train.experiment import Cadence, Experiment


def get_config() -> Experiment:
  """Returns the run."""
  return Experiment(
    name='image_text',
    model=Contrastive(
      text=DeepSeekV3(
        depth=3,
        width=128,
        vocab=8192,
        attention=MLA(heads=4, nope_dim=24, rope_dim=8, value_dim=32, latent=48),
        dense=SwiGLU(hidden=352),
        dense_layers=1,
        feed_forward=MoE(experts=8, top_k=2, hidden=96),
      ),
      image=Patch2D(
        width=128,
        depth=3,
        attention=Bidirectional(heads=4, head_dim=32, rope=Axial()),
        feed_forward=SwiGLU(hidden=320),
      ),
      projection=SharedProjection(shared_dim=160),
      text_weight=0.1,
    ),
    data=IMAGE_TEXT,
    optimizer=AdamW(peak_lr=1e-3),
    schedule=WarmupStableDecay(warmup_steps=40, decay_fraction=0.5, final=0.05),
    train_steps=1000,
    balance=SignBias(rate=1e-2),
    cadence=Cadence(log=10, evaluate=250, evaluate_batches=8, save=250),
  )
