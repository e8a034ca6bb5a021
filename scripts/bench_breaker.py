"""Times what a breaker costs, and how long a step takes in which an expert breaks.

  python scripts/bench_breaker.py [--config=quickstart] [--repeats=20]

Four kinds of steps take turns, so that all meet the same machine: without a breaker; with one and
nothing wrong; the step in which weights of one expert are not finite; and the two steps that an
expert costs whose output overflows, the one that is skipped and the one that is routed around it.
From fault to healthy routing is what the third takes beyond the second kind, or the whole of the
fourth.
"""

import dataclasses
import pathlib
import statistics
import tempfile
import time
from typing import Any

from absl import app, flags

CONFIG = flags.DEFINE_string('config', 'quickstart', 'a config of configs/')
REPEATS = flags.DEFINE_integer('repeats', 20, 'turns of each')


def main(argv: list[str]) -> None:
  """Prints medians in milliseconds, and differences of steps that took the same turn."""
  del argv
  import jax

  from deepseek_jax.core.load import load_config
  from deepseek_jax.core.override import override
  from deepseek_jax.core.precision import Float32
  from deepseek_jax.layers.moe.breaker import Breaker
  from deepseek_jax.train.experiment import resolved
  from deepseek_jax.train.expert_lifecycle import find_layers
  from deepseek_jax.train.step import build_program

  config = resolved(load_config(CONFIG.value), Float32())
  guarded, _ = override(config, {'model.feed_forward.breaker': Breaker()})
  plain, program = (build_program(one) for one in (config, guarded))
  layer = find_layers(guarded)[0]
  with tempfile.TemporaryDirectory() as cache:
    batch = next(config.data.prepare(pathlib.Path(cache)).train_batches(0))
  batch = jax.device_put(batch, program.batch_sharding)

  taken = measure(plain, program, layer, batch)
  for name, seconds in taken.items():
    beyond = [a - b for a, b in zip(seconds, taken['breaker'], strict=True)]
    print(
      f'{name:<28} {1e3 * statistics.median(seconds):8.1f} ms a step'
      f'  {1e3 * statistics.median(beyond):+8.1f} ms against a breaker with nothing to do'
    )
  both = [a + b for a, b in zip(taken['output'], taken['output, the step after it'], strict=True)]
  whole = 1e3 * statistics.median(both)
  print(f'an output that overflows, until a step is done around it: {whole:.1f} ms')


def measure(plain: Any, program: Any, layer: Any, batch: Any) -> dict[str, list[float]]:
  """Returns seconds of each kind of step, turn by turn; every kind is checked for what it is."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.core.tree import flatten, unflatten

  def spoil(state: Any, factor: float) -> Any:
    """Multiplies the matrices of the third expert of the first layer that has any."""
    # Copies: the step is given the memory of its state.
    state = jax.tree.map(jnp.copy, state)
    flat = flatten(state.params)
    for name, axes in flatten(program.axes).items():
      if name.startswith(layer.address) and 'expert' in axes:
        flat[name] = flat[name].at[(0, 2) if axes[0] == 'layers' else 2].multiply(factor)
    return dataclasses.replace(state, params=unflatten(flat))

  # Tampering keeps every array where the step wants it, and is no part of what is timed.
  layout = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
  tamper = jax.jit(spoil, out_shardings=layout)
  start = program.init(jax.random.key(0))

  def timed(run: Any, state: Any) -> tuple[float, Any, Any]:
    jax.block_until_ready(state)
    begin = time.perf_counter()
    state, metrics = run.step(state, batch)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - begin, state, metrics

  base = plain.init(jax.random.key(0))
  taken: dict[str, list[float]] = {
    name: [] for name in ('no breaker', 'breaker', 'weights', 'output', 'output, the step after it')
  }
  for turn in range(REPEATS.value + 1):
    spent = {}
    spent['no breaker'], base, _ = timed(plain, base)
    spent['breaker'], _, metrics = timed(program, tamper(start, jnp.float32(1)))
    assert not bool(metrics['experts']['changed'])
    spent['weights'], _, metrics = timed(program, tamper(start, jnp.float32(jnp.nan)))
    assert bool(jnp.isfinite(metrics['loss']))
    assert int(metrics['guard']['fault']) == 0
    assert int(metrics['experts']['usable']) == layer.moe.experts - 1
    spent['output'], state, metrics = timed(program, tamper(start, jnp.float32(1e25)))
    assert int(metrics['guard']['fault']) == 1
    assert int(metrics['experts']['usable']) == layer.moe.experts - 1
    spent['output, the step after it'], _, metrics = timed(program, state)
    assert int(metrics['guard']['fault']) == 0
    if turn:  # the first compiles
      for name, seconds in spent.items():
        taken[name].append(seconds)
  return taken


if __name__ == '__main__':
  app.run(main)
