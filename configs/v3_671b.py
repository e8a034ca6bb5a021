"""DeepSeek-V3, 671 billion parameters, as published: pre-training on 4,096-token rows.

Command: python scripts/train.py --config=configs/v3_671b.py --workdir=runs/v3
  started on every host; the text is yours: --config.data.source='TextFiles("…")', since the
  embedded corpus is only what lets the config be built anywhere.
Hardware: 1,024 accelerators of 80 GB or more, as 64 (data) × 16 (expert). Float32 weights, float32
  gradients and bfloat16 moments take about 11 GB of each; activations the rest, one row at a time.
Cost: 14.8 T tokens. The authors report 2.664 M H800 hours, 108 days of 1,024, with float8 products,
  a pipeline and kernels of their own. This layout is in bfloat16, without a pipeline, and has never
  been run: expect it to be slower. Tokens travel to their experts; a device has room for twice its
  even share of them, where room for everything would take 7.5 GB for the rows of one layer.
Expected: the published base model, given the authors' data.

What differs from the paper: its batch grows from 3,072 to 15,360 rows over the first 469 B tokens,
ours is 15,360 throughout; its last 500 B tokens run at two constant rates (2.2e-5, 7.3e-6), ours
decay to the first of them and stop; YaRN is on from the start, so that the architecture is the
released model's, where the authors add it after pre-training; documents do not see each other;
choices beyond a device's room are dropped and logged, where the authors drop none.

Source: DeepSeek-V3, arXiv 2412.19437, sections 4.2 and 4.3, and the released configuration.
"""

from deepseek_jax.core.precision import BFloat16
from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.data.tokenizer import DeepSeekVocabulary
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.rope import RoPE, YaRN
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.balance import SequenceBalance
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.mtp import MTP
from deepseek_jax.models.remat import EveryLayer
from deepseek_jax.optim.balance import SignBias
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import MultiStep, WarmupStableDecay
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT
from deepseek_jax.train.experiment import Cadence, Experiment
from deepseek_jax.train.objective import NextToken

ROWS, LENGTH = 15_360, 4096
STEPS = round(14.8e12 / (ROWS * LENGTH))


def get_config() -> Experiment:
  """Returns the run."""
  return Experiment(
    name='v3_671b',
    model=DeepSeekV3(
      depth=61,
      width=7168,
      vocab=129_280,
      attention=MLA(
        heads=128,
        nope_dim=128,
        rope_dim=64,
        value_dim=128,
        latent=512,
        query_latent=1536,
        rope=RoPE(theta=10_000.0, yarn=YaRN(factor=40.0, original_length=4096)),
      ),
      dense=SwiGLU(hidden=18_432),
      dense_layers=3,
      feed_forward=MoE(
        experts=256,
        top_k=8,
        hidden=2048,
        shared=1,
        router=Sigmoid(groups=8, kept_groups=4, scale=2.5),
        balance=SequenceBalance(weight=1e-4),
        dispatch=AllToAll(bound=2.0),
      ),
      mtp=MTP(depth=1),
    ),
    data=TextCorpus(tokenizer=DeepSeekVocabulary(), length=LENGTH, batch_size=ROWS),
    optimizer=AdamW(
      peak_lr=2.2e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=1.0, moments='bfloat16'
    ),
    # Constant until 10 T tokens, then down to a tenth.
    schedule=WarmupStableDecay(warmup_steps=2000, decay_fraction=0.324, final=0.1, shape='cosine'),
    train_steps=STEPS,
    # λ is 0.3 for the first 10 T tokens and 0.1 for the others.
    objective=NextToken(
      mtp_weight=0.3,
      mtp_schedule=MultiStep(warmup_steps=0, boundaries=(10 / 14.8,), factor=1 / 3),
      chunk=256,
    ),
    # The bias stands still for the last 500 B tokens.
    balance=SignBias(
      rate=1e-3, schedule=MultiStep(warmup_steps=0, boundaries=(14.3 / 14.8,), factor=0.0)
    ),
    # One row a device at a time: the reference attention holds every score of a row.
    microbatches=15,
    remat=EveryLayer(),
    precision=BFloat16(),
    mesh=MeshConfig(data=64, expert=16),
    rules=EXPERT,
    cadence=Cadence(log=10, evaluate=1000, evaluate_batches=1, save=500),
  )
