"""DeepSeek-V2-Lite, 15.7 billion parameters, as published: pre-training on 4,096-token rows.

Command: python scripts/train.py --config=configs/v2_lite.py --workdir=runs/v2_lite
  started on every host; text and tokenizer are yours: --config.data.source='TextFiles("…")'
  --config.data.tokenizer='TokenizerFile("…")', since the embedded ones are only what lets the
  config be built anywhere.
Hardware: 64 accelerators of 80 GB, or more.
Cost: 5.7 T tokens. It has never been run here.
Expected: the published base model, given the authors' data.

YaRN is on from the start, so that the architecture is the released model's, where the authors add
it after pre-training; documents do not see each other; the second token is not predicted.

Source: DeepSeek-V2, arXiv 2405.04434, appendix B, and the released configuration.
"""

from deepseek_jax.core.precision import BFloat16
from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.rope import RoPE, YaRN
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.balance import ExpertBalance
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.softmax import Softmax
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.remat import EveryLayer
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import MultiStep
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import FSDP
from deepseek_jax.train.experiment import Cadence, Experiment
from deepseek_jax.train.objective import NextToken

ROWS, LENGTH = 4608, 4096
VOCAB = 102_400
ROPE = RoPE(
  theta=10_000.0,
  yarn=YaRN(factor=40.0, original_length=4096, mscale=0.707, mscale_all=0.707),
)


def get_config() -> Experiment:
  """Returns the run."""
  return Experiment(
    name='v2_lite',
    model=DeepSeekV3(
      depth=27,
      width=2048,
      vocab=VOCAB,
      attention=MLA(heads=16, nope_dim=128, rope_dim=64, value_dim=128, latent=512, rope=ROPE),
      dense=SwiGLU(hidden=10_944),
      dense_layers=1,
      feed_forward=MoE(
        experts=64,
        top_k=6,
        hidden=1408,
        shared=2,
        router=Softmax(),
        balance=ExpertBalance(weight=1e-3),
      ),
    ),
    data=TextCorpus(length=LENGTH, batch_size=ROWS),
    optimizer=AdamW(peak_lr=4.2e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=1.0),
    schedule=MultiStep(warmup_steps=2000, boundaries=(0.8, 0.9), factor=0.316),
    train_steps=round(5.7e12 / (ROWS * LENGTH)),
    objective=NextToken(chunk=256),
    balance=None,
    microbatches=9,
    remat=EveryLayer(),
    precision=BFloat16(),
    mesh=MeshConfig(data=64),
    rules=FSDP,
    cadence=Cadence(log=10, evaluate=1000, evaluate_batches=1, save=500),
  )
