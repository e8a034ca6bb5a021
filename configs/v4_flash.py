"""DeepSeek-V4-Flash, 284 billion parameters, as published: pre-training on 4,096-token rows.

Command: python scripts/train.py --config=configs/v4_flash.py --workdir=runs/v4_flash
  started on every host; the text is yours: --config.data.source='TextFiles("…")'.
Hardware: 512 accelerators of 80 GB or more, as 64 (data) × 8 (expert).
Cost: 32 T tokens. It has never been run here.
Expected: the published base model, given the authors' data and their stages of longer rows.

What differs from the report: rows of 4,096 throughout, where the authors go on with 16 K, 64 K and
1 M; attention is sparse from the start, where theirs is dense for the first trillion tokens; the
expert table of the first layers is drawn, and not the released one.

Source: DeepSeek-V4, arXiv 2606.19348, sections 2 and 4, and the released configuration.
"""

import dataclasses
from typing import Any

from deepseek_jax.core.precision import BFloat16
from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.data.tokenizer import DeepSeekVocabulary
from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.moe.balance import SequenceBalance
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.hash import Hash
from deepseek_jax.layers.moe.router.sqrt_softplus import SqrtSoftplus
from deepseek_jax.models.deepseek_v4 import DeepSeekV4
from deepseek_jax.models.mtp import LaneMTP
from deepseek_jax.models.remat import EveryLayer
from deepseek_jax.optim.balance import SignBias
from deepseek_jax.optim.muon import Muon
from deepseek_jax.optim.schedule import MultiStep, WarmupStableDecay
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT
from deepseek_jax.train.experiment import Cadence, Experiment
from deepseek_jax.train.objective import NextToken

ROWS, LENGTH = 18_432, 4096
VOCAB = 129_280
STEPS = round(32e12 / (ROWS * LENGTH))
HASHED = 3


def get_config() -> Experiment:
  """Returns the run."""
  sizes: dict[str, Any] = {
    'heads': 64,
    'head_dim': 512,
    'rope_dim': 64,
    'query_latent': 1024,
    'groups': 8,
    'group_dim': 1024,
    'window': 128,
  }
  window = SharedWindow(**sizes, rope=RoPE(theta=10_000.0))
  routed = MoE(
    experts=256,
    top_k=6,
    hidden=2048,
    limit=10.0,
    shared=1,
    router=SqrtSoftplus(scale=1.5),
    balance=SequenceBalance(weight=1e-4),
    dispatch=AllToAll(bound=2.0),
  )
  return Experiment(
    name='v4_flash',
    model=DeepSeekV4(
      depth=43,
      width=4096,
      vocab=VOCAB,
      first=window,
      sparse=CSA(**sizes, ratio=4, top_k=512, index_heads=64, index_dim=128),
      heavy=HCA(**sizes, ratio=128),
      feed_forward=routed,
      hashed=dataclasses.replace(routed, router=Hash(vocab=VOCAB, scale=1.5)),
      hashed_layers=HASHED,
      mtp=LaneMTP(attention=window),
    ),
    data=TextCorpus(tokenizer=DeepSeekVocabulary(), length=LENGTH, batch_size=ROWS),
    optimizer=Muon(peak_lr=2.7e-4, fast_steps=8, settling_steps=2, consistent_rms=0.18),
    schedule=WarmupStableDecay(warmup_steps=2000, decay_fraction=0.1, final=0.1, shape='cosine'),
    train_steps=STEPS,
    objective=NextToken(
      mtp_weight=0.3,
      mtp_schedule=MultiStep(warmup_steps=0, boundaries=(0.9,), factor=1 / 3),
      chunk=256,
    ),
    balance=SignBias(rate=1e-3),
    microbatches=36,
    remat=EveryLayer(),
    precision=BFloat16(),
    mesh=MeshConfig(data=64, expert=8),
    rules=EXPERT,
    cadence=Cadence(log=10, evaluate=1000, evaluate_batches=1, save=500),
  )
