"""A small DeepSeek-V3 that learns English on a laptop."""

from deepseek_jax.core.precision import Fastest
from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.mtp import MTP
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.train.experiment import Cadence, Experiment


def get_config() -> Experiment:
  """Returns the run."""
  return Experiment(
    name='quickstart',
    model=DeepSeekV3(
      depth=4,
      width=256,
      vocab=8192,
      attention=MLA(heads=4, nope_dim=32, rope_dim=32, value_dim=64, latent=64, query_latent=None),
      dense=SwiGLU(hidden=768),
      dense_layers=1,
      feed_forward=MoE(experts=16, top_k=2, hidden=256, shared=1),
      mtp=MTP(depth=1),
    ),
    data=TextCorpus(length=256, batch_size=16),
    optimizer=AdamW(peak_lr=3e-3),
    schedule=WarmupStableDecay(warmup_steps=20, decay_fraction=0.3, final=0.05),
    train_steps=300,
    precision=Fastest(),
    cadence=Cadence(log=10, evaluate=100, evaluate_batches=8, sample=100, save=100),
    prompts=('The people of the United States', 'And God said', 'It was a dark night, and'),
  )
