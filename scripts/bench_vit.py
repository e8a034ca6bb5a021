"""Training speed of the encoder of pictures, beside transformers' SigLIP encoder on torch.

  python -m scripts.bench_vit --torch_python=VENV/bin/python [--precision=bfloat16] [--rounds=7]

Both have the same layers (patches, learned positions, layer norms with offsets, tanh GELU), random
pictures, a mean of squares as loss, and AdamW. Each has a process of its own and sleeps while the
other makes its step. Figures are medians of the rounds.
"""

import os
import statistics
import sys
import time
from typing import Any

from absl import app, flags

from scripts.contestant import ROOT, Contestant

START = time.perf_counter()
TORCH_PYTHON = flags.DEFINE_string('torch_python', None, 'interpreter with torch, transformers')
PRECISION = flags.DEFINE_enum('precision', 'float32', ['float32', 'bfloat16'], 'of both')
ROUNDS = flags.DEFINE_integer('rounds', 7, 'rounds that count', lower_bound=2)
WARMUP = flags.DEFINE_integer('warmup', 3, 'rounds before them', lower_bound=1)
SIZE = flags.DEFINE_integer('size', 224, 'pixels of a side')
PATCH = flags.DEFINE_integer('patch', 16, 'pixels of a side of a patch')
WIDTH = flags.DEFINE_integer('width', 384, 'channels; heads have 64')
DEPTH = flags.DEFINE_integer('depth', 6, 'layers')
BATCH = flags.DEFINE_integer('batch', 8, 'pictures a step')
WORKER = flags.DEFINE_bool('worker', False, 'used by the script itself')


def main(argv: list[str]) -> None:
  """Runs both in turn and prints the table."""
  del argv
  if WORKER.value:
    work()
    return
  sizes = {f.name: f.value for f in (SIZE, PATCH, WIDTH, DEPTH, BATCH)}
  command = [
    sys.executable,
    '-m',
    'scripts.bench_vit',
    f'--precision={PRECISION.value}',
    '--worker',
  ]
  command += [f'--{name}={value}' for name, value in sizes.items()]
  contestants = {'ours': Contestant(command)}
  if TORCH_PYTHON.value:
    file = str(ROOT / 'scripts/bench_vit_torch.py')
    numbers = [str(value) for value in (*sizes.values(), os.cpu_count())]
    peer = Contestant([TORCH_PYTHON.value, file, PRECISION.value, *numbers])
    contestants['transformers'] = peer
    if peer.facts[0] != contestants['ours'].facts[0]:
      raise SystemExit(f'{contestants["ours"].facts[0]:,.0f} and {peer.facts[0]:,.0f} parameters')
  for _ in range(WARMUP.value + ROUNDS.value):
    for contestant in contestants.values():
      contestant.step()
  mine = contestants['ours'].seconds(WARMUP.value)
  print(
    f'{contestants["ours"].facts[0]:,.0f} parameters, {BATCH.value} pictures of {SIZE.value} '
    f'pixels a step, {PRECISION.value}, {ROUNDS.value} rounds'
  )
  print(f'{"":<14} pictures/s (quartiles)   ours / it (range)    peak memory')
  for name, contestant in contestants.items():
    spent = contestant.seconds(WARMUP.value)
    low, middle, high = (BATCH.value / s for s in reversed(statistics.quantiles(spent, n=4)))
    ratios = [other / own for own, other in zip(mine, spent, strict=True)]
    print(
      f'{name:<14} {middle:7.2f} ({low:.2f} to {high:.2f})   {statistics.median(ratios):6.2f} '
      f'({min(ratios):.2f} to {max(ratios):.2f})   {contestant.rows[-1][2] / 1e9:.1f} GB'
    )
    contestant.close()


def work() -> None:
  """Answers to `step` on standard input with one training step of ours."""
  from deepseek_jax.core.allocator import keep_freed_memory

  keep_freed_memory()
  import jax
  import jax.numpy as jnp

  from deepseek_jax.train.throughput import peak_memory_bytes

  imported = time.perf_counter() - START
  dtype = jnp.bfloat16 if PRECISION.value == 'bfloat16' else jnp.float32
  step, state, media = training_step(dtype)
  compiled = step.lower(*state, media).compile()
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state[0]))
  print('ready', parameters, imported, flush=True)
  for line in sys.stdin:
    if line.strip() != 'step':
      break
    start = time.perf_counter()
    *state, loss = compiled(*state, media)
    jax.block_until_ready((state, loss))
    spent = time.perf_counter() - start
    print('step', spent, float(loss), float(peak_memory_bytes()), flush=True)


def training_step(dtype: Any) -> tuple[Any, tuple[Any, Any], Any]:
  """Returns a step, weights with the optimizer's state, and pictures.

  Args:
    dtype: of what is computed; weights are float32.
  """
  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from deepseek_jax.layers.context import Media
  from deepseek_jax.models.encoder import Encoder
  from deepseek_jax.sharding.rules import Rules

  class NoProjection:
    """The encoder of the peer ends in its last norm."""

    def own(self, width: int) -> Any:
      del width
      return lambda x: x

  encoder = Encoder(siglip(), WIDTH.value, dtype, None, NoProjection())  # type: ignore[arg-type]
  shape = (BATCH.value, 1, SIZE.value, SIZE.value, 3)
  values = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  media = Media(jnp.asarray(values), jnp.full((BATCH.value, 1), SIZE.value, jnp.int32))
  params = nn.meta.unbox(encoder.init(jax.random.key(0), media, Rules()))['params']
  rule = optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=1e-2)
  goal = jnp.sin(jnp.arange(WIDTH.value, dtype=jnp.float32))

  def loss(params: Any, media: Any) -> jax.Array:
    hidden: Any = encoder.apply({'params': params}, media, Rules())
    return jnp.mean(jnp.square(hidden[0].astype(jnp.float32) - goal))

  def step(params: Any, state: Any, media: Any) -> tuple[Any, Any, jax.Array]:
    value, gradients = jax.value_and_grad(loss)(params, media)
    updates, state = rule.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value

  return jax.jit(step, donate_argnums=(0, 1)), (params, rule.init(params)), media


def siglip() -> Any:
  """Returns the encoder of SigLIP in this project's parts."""
  from deepseek_jax.layers.attention.bidirectional import Bidirectional
  from deepseek_jax.layers.bias import Bias
  from deepseek_jax.layers.encoders.patch import Patch2D
  from deepseek_jax.layers.feed_forward import MLP, TanhGELU
  from deepseek_jax.layers.norm import LayerNorm

  return Patch2D(
    size=SIZE.value,
    patch=PATCH.value,
    merge=1,
    width=WIDTH.value,
    depth=DEPTH.value,
    attention=Bidirectional(heads=WIDTH.value // 64, head_dim=64, bias=Bias()),
    feed_forward=MLP(hidden=4 * WIDTH.value, unit=TanhGELU()),
    norm=LayerNorm(epsilon=1e-6),
    bias=Bias(),
  )


if __name__ == '__main__':
  app.run(main)
