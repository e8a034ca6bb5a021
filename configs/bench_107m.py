"""The model of 107 million parameters on which training speed is compared with other codebases.

Command:  python scripts/bench_train.py
Hardware: 2 CPU cores, 5 GB of memory.
Time:     5 to 15 s a step on a CPU of 60 to 200 float32 GFLOP/s.
Expected: 107,277,312 parameters beside the routers' biases, 26.0 million of them in the matrix
          products of a token; dropless, float32 master weights, 4,096 tokens a step.
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
    name='bench_107m',
    model=DeepSeekV3(
      depth=8,
      width=512,
      vocab=8192,
      attention=MLA(heads=8, nope_dim=64, rope_dim=32, value_dim=64, latent=128, query_latent=192),
      dense=SwiGLU(hidden=1408),
      dense_layers=1,
      feed_forward=MoE(experts=32, top_k=4, hidden=256),
    ),
    data=TextCorpus(length=512, batch_size=8),
    optimizer=AdamW(peak_lr=6e-4),
    schedule=WarmupStableDecay(warmup_steps=100, decay_fraction=0.2),
    train_steps=2000,
    precision=Fastest(),
    cadence=Cadence(log=5, evaluate=500, evaluate_batches=8, save=250),
  )
