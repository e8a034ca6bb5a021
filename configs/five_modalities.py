"""One MoE decoder that captions drawings, clips, sounds and clouds of points: five modalities.

Four small encoders of one shape end in one shared projection; what they make stands in the place of
tokens, several documents a row, in any order. Clips, sounds and clouds are made on the spot from
their numbers, so that nothing is downloaded; descriptions that are held out never come in training.

Command:  python scripts/train.py --config=configs/five_modalities.py --workdir=runs/five
          python scripts/evaluate.py --workdir=runs/five
Hardware: 2 CPU cores.
Time:     not measured on a quiet machine.
"""

from deepseek_jax.data.media.presets import FIVE_MODALITIES
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.rope import Axial
from deepseek_jax.layers.encoders.line import Waveform
from deepseek_jax.layers.encoders.patch import Patch2D, Patch3D
from deepseek_jax.layers.encoders.points import Points
from deepseek_jax.layers.encoders.projection import SharedProjection
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
  width, depth, feed_forward = 96, 2, SwiGLU(hidden=256)
  grid = Bidirectional(heads=4, head_dim=24, rope=Axial())
  line = Bidirectional(heads=4, head_dim=24)
  return Experiment(
    name='five_modalities',
    model=Multimodal(
      text=DeepSeekV3(
        depth=4,
        width=160,
        vocab=8192,
        attention=MLA(heads=4, nope_dim=24, rope_dim=16, value_dim=40, latent=64),
        dense=SwiGLU(hidden=448),
        dense_layers=1,
        feed_forward=MoE(experts=16, top_k=2, hidden=112),
      ),
      image=Patch2D(width=width, depth=depth, attention=grid, feed_forward=feed_forward),
      video=Patch3D(width=width, depth=depth, attention=grid, feed_forward=feed_forward),
      sound=Waveform(
        width=width,
        depth=depth,
        attention=line,
        feed_forward=feed_forward,
        samples=12_800,
        rate=8000,
        window=200,
        hop=100,
        bands=64,
        merge=4,
      ),
      points=Points(
        width=width, depth=depth, attention=line, feed_forward=feed_forward, features=3
      ),
      projection=SharedProjection(shared_dim=192),
    ),
    data=FIVE_MODALITIES,
    optimizer=AdamW(peak_lr=2e-3),
    schedule=WarmupStableDecay(warmup_steps=40, decay_fraction=0.5, final=0.05),
    train_steps=1000,
    balance=SignBias(rate=1e-2),
    cadence=Cadence(log=10, evaluate=300, evaluate_batches=6, save=300),
  )
