"""Times ways to multiply sorted rows with a matrix a group, forward and gradient, in one run.

  python scripts/bench_grouped_matmul.py [--rows=8192] [--experts=16] [--width=256] [--hidden=256]

Baseline: a dense product of as many useful FLOPs. Beside it: our loop over blocks, the same blocks
as one batched product over gathered copies of the matrices, and `jax.lax.ragged_dot`.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags

ROWS = flags.DEFINE_integer('rows', 8192, 'rows, all groups together')
EXPERTS = flags.DEFINE_integer('experts', 16, 'groups')
WIDTH = flags.DEFINE_integer('width', 256, 'input channels')
HIDDEN = flags.DEFINE_integer('hidden', 256, 'output channels')
REPEATS = flags.DEFINE_integer('repeats', 7, 'runs of each; they take turns')


def main(argv: list[str]) -> None:
  """Prints medians as ratios to the dense product."""
  del argv
  import jax
  import jax.numpy as jnp

  from deepseek_jax.ops.experts import block_rows, sort_by_expert
  from deepseek_jax.ops.grouped_matmul import (
    block_groups,
    grouped_matmul_blocks,
    grouped_matmul_ragged,
  )

  rows, experts = ROWS.value, EXPERTS.value
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (rows, WIDTH.value))
  w = jax.random.normal(keys[1], (experts, WIDTH.value, HIDDEN.value))
  chosen = jax.random.randint(keys[2], (rows, 1), 0, experts)
  block = block_rows(rows, experts)
  layout = sort_by_expert(chosen, experts, block)
  sorted_x = jnp.take(x, layout.pair, axis=0, mode='fill', fill_value=0)
  loads = jnp.bincount(chosen[:, 0], length=experts).astype(jnp.int32)

  def batched(x: jax.Array, w: jax.Array) -> jax.Array:
    blocks = x.shape[0] // block
    groups, _ = block_groups(layout.sizes, block, blocks)
    return jnp.einsum('nbd,ndf->nbf', x.reshape(blocks, block, -1), w[groups])

  ways: dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]] = {
    'dense, same FLOPs': (lambda x, w: x @ w, (x, w[0])),
    'loop over blocks (ours)': (
      lambda x, w: grouped_matmul_blocks(x, w, layout.sizes, block), (sorted_x, w)
    ),
    'batched over copies': (batched, (sorted_x, w)),
    'ragged_dot': (lambda x, w: grouped_matmul_ragged(x, w, loads), (x, w)),
  }  # fmt: skip
  for name, differentiate in (('forward', False), ('forward and gradient', True)):
    seconds = compare(ways, differentiate)
    base = seconds['dense, same FLOPs']
    flops = 2 * rows * WIDTH.value * HIDDEN.value * (3 if differentiate else 1)
    print(f'{name} ({rows} rows, {experts} groups, blocks of {block})')
    for way, spent in seconds.items():
      print(f'  {way:<26} {spent / base:7.2f} × dense  {flops / spent / 1e9:7.1f} useful GFLOP/s')


def compare(ways: dict[str, Any], differentiate: bool) -> dict[str, float]:
  """Returns the median seconds of each way; they take turns, so that all meet the same machine."""
  import jax
  import jax.numpy as jnp

  programs = {}
  for name, (function, operands) in ways.items():
    run = function
    if differentiate:
      run = jax.grad(lambda x, w, f=function: jnp.sum(jnp.square(f(x, w))), argnums=(0, 1))
    programs[name] = (jax.jit(run).lower(*operands).compile(), operands)
  taken: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(REPEATS.value + 1):
    for name, (program, operands) in programs.items():
      begin = time.perf_counter()
      jax.block_until_ready(program(*operands))
      taken[name].append(time.perf_counter() - begin)
  # The first round warms up.
  return {name: statistics.median(spent[1:]) for name, spent in taken.items()}


if __name__ == '__main__':
  app.run(main)
