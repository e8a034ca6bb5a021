"""The model that is measured: a small DeepSeek-V3 with experts in every layer."""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.core.precision import BFloat16, Float32
from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.remat import Compressed, EveryLayer, Remat, Save, SquareRoot
from deepseek_jax.optim.balance import SignBias
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.objective import batch_context, batch_totals, training_loss
from deepseek_jax.train.on_mesh import OnMesh
from deepseek_jax.train.step import Program


def experiment(
  depth: int,
  remat: EveryLayer | SquareRoot | Save | Compressed | None,
  rows: int,
  *,
  microbatches: int = 1,
  dtype: str = 'float32',
  steps: int = 400,
) -> Experiment:
  """Returns a run on bytes, in rows of 128."""
  return Experiment(
    name='rematerialisation',
    model=DeepSeekV3(
      depth=depth,
      width=128,
      vocab=264,
      attention=MLA(heads=4, nope_dim=16, rope_dim=8, value_dim=16, latent=32),
      dense=SwiGLU(hidden=256),
      # One segment: SquareRoot then cuts depths that are squares evenly.
      dense_layers=0,
      feed_forward=MoE(experts=8, top_k=2, hidden=64, shared=1),
    ),
    data=TextCorpus(tokenizer=Bytes(), length=128, batch_size=rows),
    optimizer=AdamW(peak_lr=3e-3),
    schedule=WarmupStableDecay(warmup_steps=20, decay_fraction=0.4, final=0.05),
    train_steps=steps,
    balance=SignBias(rate=1e-2),
    microbatches=microbatches,
    remat=remat,
    precision=Float32() if dtype == 'float32' else BFloat16(),
  )


def make_gradients(program: Program, remat: Remat | None) -> OnMesh:
  """Returns the jitted `(params, buffers, batch) -> gradients`."""
  chosen = program.experiment
  decoder = chosen.model.build(remat=remat)

  def loss(params: Any, buffers: Any, batch: Any) -> jax.Array:
    variables = {'params': params, 'buffers': buffers}
    context, totals = batch_context(batch, chosen.rules), batch_totals(batch, 0)
    return training_loss(
      decoder, variables, batch, totals, jnp.float32(0), context, chosen.objective.chunk
    )[0]

  return OnMesh(program.mesh, jax.jit(jax.grad(loss)))
