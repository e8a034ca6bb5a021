"""A small DeepSeek-V3 that learns English in minutes: latent attention, experts, MTP.

Command:  scripts/quickstart.sh, or
          python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart
Hardware: 2 CPU cores, 2 GB of memory.
Time:     under 6 minutes.
Expected: about 2 bits per byte of held-out text, below `xz -9e` and a unigram model.
"""

from deepseek_jax.core.precision import Fastest
from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.mtp import MTP
from deepseek_jax.optim.balance import SignBias
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.train.experiment import Cadence, Experiment


def get_config() -> Experiment:
  """Returns the run."""
  return Experiment(
    name='quickstart',
    model=DeepSeekV3(
      depth=4,
      width=192,
      vocab=8192,
      attention=MLA(heads=4, nope_dim=32, rope_dim=16, value_dim=48, latent=64),
      dense=SwiGLU(hidden=512),
      dense_layers=1,
      feed_forward=MoE(experts=16, top_k=2, hidden=128),
      mtp=MTP(depth=1),
    ),
    data=TextCorpus(length=256, batch_size=8),
    optimizer=AdamW(peak_lr=4e-3),
    schedule=WarmupStableDecay(warmup_steps=15, decay_fraction=0.5, final=0.05),
    train_steps=150,
    # Ten times DeepSeek's rate, for a run a hundred thousand times shorter.
    balance=SignBias(rate=1e-2),
    precision=Fastest(),
    cadence=Cadence(log=5, evaluate=75, evaluate_batches=8, sample=75, save=75),
    prompts=('The people of the United States', 'And the LORD said unto', 'She was very'),
  )
