"""What the order of weight gradients is worth here: `ops.linear` against JAX's own rule.

  python -m scripts.bench_linear [--rounds=5]

Both make the same training step in bfloat16 from the same state, in turn; the ratio of each round
counts. Above them, the three products of one weight matrix alone, in both dtypes. Only the compiler
sees a difference: what is computed is the same.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags

from deepseek_jax.core.allocator import keep_freed_memory
from deepseek_jax.ops import linear as module

ROUNDS = flags.DEFINE_integer('rounds', 5, 'rounds that count', lower_bound=1)
WARMUP = flags.DEFINE_integer('warmup', 2, 'rounds before them', lower_bound=1)
SHAPES = ((8 * 512, 512, 1408), (8 * 196, 384, 1536))
"""Rows, inputs and outputs of matrices whose products are timed alone."""


def seconds(run: Callable[[], Any]) -> float:
  """Returns how long a run takes until its result is there."""
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


def compare(runs: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
  """Runs all in turn; returns the seconds of the rounds that count."""
  found: dict[str, list[float]] = {name: [] for name in runs}
  for number in range(WARMUP.value + ROUNDS.value):
    for name, run in runs.items():
      spent = seconds(run)
      if number >= WARMUP.value:
        found[name].append(spent)
  return found


def report(label: str, found: dict[str, list[float]]) -> None:
  """Prints the medians and the ratio of the rounds."""
  ours, theirs = found['ours'], found["JAX's"]
  ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
  print(
    f"{label:<40} {1e3 * statistics.median(theirs):9.1f} ms by JAX's rule, "
    f'{1e3 * statistics.median(ours):9.1f} ms by ours: {statistics.median(ratios):.2f} '
    f'({min(ratios):.2f} to {max(ratios):.2f})',
    flush=True,
  )


def products(rows: int, inner: int, outer: int, dtype: str) -> dict[str, Callable[[], Any]]:
  """Returns the two ways to make a product and both its gradients."""
  keys = jax.random.split(jax.random.key(0), 3)
  sizes = ((8, rows // 8, inner), (inner, outer), (8, rows // 8, outer))
  given = [jax.random.normal(key, size, dtype) for key, size in zip(keys, sizes, strict=True)]

  def three(function: Any) -> Callable[[], Any]:
    def run(x: jax.Array, w: jax.Array, grad: jax.Array) -> Any:
      y, pull = jax.vjp(function, x, w)
      return y, *pull(grad)

    compiled = jax.jit(run).lower(*given).compile()
    return lambda: compiled(*given)

  return {'ours': three(module.linear), "JAX's": three(module.linear_reference)}


def steps() -> dict[str, Callable[[], Any]]:
  """Returns the training step with both rules, each with a state of its own."""
  from configs.bench_107m import get_config
  from deepseek_jax.core.precision import BFloat16
  from deepseek_jax.train.step import build_program
  from scripts.random_batch import random_batch

  experiment = dataclasses.replace(get_config(), precision=BFloat16())

  def made() -> Callable[[], Any]:
    program = build_program(experiment, jax.devices()[:1])
    step = program.step.compile(program.abstract_state, program.abstract_batch())
    batch = jax.device_put(random_batch(experiment), program.batch_sharding)
    held = [program.init(jax.random.key(0))]

    def run() -> Any:
      held[0], metrics = step(held[0], batch)
      return held[0], metrics

    return run

  ours, own_rule = made(), module._linear
  # Traced anew, the layers find JAX's rule in its place.
  module._linear = module.linear_reference  # type: ignore[assignment]
  try:
    theirs = made()
  finally:
    module._linear = own_rule
  return {'ours': ours, "JAX's": theirs}


def main(argv: list[str]) -> None:
  """Measures and prints."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  keep_freed_memory()
  for shape in SHAPES:
    for dtype in ('float32', 'bfloat16'):
      label = f'three products, {"×".join(map(str, shape))}, {dtype}'
      report(label, compare(products(*shape, dtype)))
  report('step of bench_107m, bfloat16', compare(steps()))


if __name__ == '__main__':
  app.run(main)
