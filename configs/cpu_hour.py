"""An hour of DeepSeek-V3 on two CPU cores: sparse experts against n-gram models.

Command:  python scripts/train.py --config=configs/cpu_hour.py --workdir=runs/hour
Hardware: 2 CPU cores, 2 GB of memory.
Time:     56 minutes of steps, measured on a shared machine without AVX-512.
Result:   1.437 bits per byte of held-out text; an interpolated bigram needs 1.631, a Kneser–Ney
          5-gram 1.437 (experiments/first_hour/README.md).
"""

from deepseek_jax.core.precision import Fastest
from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.train.experiment import Cadence, Experiment


def get_config() -> Experiment:
  """Returns the run."""
  return Experiment(
    name='cpu_hour',
    model=DeepSeekV3(
      depth=4,
      width=192,
      vocab=8192,
      attention=MLA(heads=4, nope_dim=32, rope_dim=16, value_dim=48, latent=64),
      dense=SwiGLU(hidden=512),
      dense_layers=1,
      feed_forward=MoE(experts=16, top_k=2, hidden=128),
    ),
    data=TextCorpus(length=256, batch_size=8),
    optimizer=AdamW(peak_lr=3e-3),
    schedule=WarmupStableDecay(warmup_steps=100, decay_fraction=0.4, final=0.03),
    train_steps=2000,
    precision=Fastest(),
    cadence=Cadence(log=20, evaluate=500, evaluate_batches=16, sample=500, save=500),
    prompts=('The people of the United States', 'And God said', 'She was very'),
  )
