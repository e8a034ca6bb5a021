"""Times a training step without a guard, with it, and with averaged weights, in one run.

  python scripts/bench_guard.py [--config=quickstart] [--repeats=20]

The three take turns, step by step, so that all meet the same machine. Each step is waited for, and
the guard's verdict is read as the training loop reads it.
"""

import dataclasses
import pathlib
import statistics
import tempfile
import time
from typing import Any

from absl import app, flags

CONFIG = flags.DEFINE_string('config', 'quickstart', 'a config of configs/')
REPEATS = flags.DEFINE_integer('repeats', 20, 'steps of each; they take turns')


def main(argv: list[str]) -> None:
  """Prints medians as ratios to the step without a guard."""
  del argv
  import jax

  from deepseek_jax.core.load import load_config
  from deepseek_jax.core.precision import Float32
  from deepseek_jax.optim.ema import EMA
  from deepseek_jax.train.experiment import resolved
  from deepseek_jax.train.guard import Guard
  from deepseek_jax.train.step import build_program

  config = resolved(load_config(CONFIG.value), Float32())
  ways: dict[str, dict[str, Any]] = {
    'no guard': {'guard': None, 'ema': None},
    'guard': {'guard': Guard(), 'ema': None},
    'guard and averaged weights': {'guard': Guard(), 'ema': EMA()},
  }
  programs = [build_program(dataclasses.replace(config, **way)) for way in ways.values()]
  with tempfile.TemporaryDirectory() as cache:
    batch = next(config.data.prepare(pathlib.Path(cache)).train_batches(0))
  batch = jax.device_put(batch, programs[0].batch_sharding)
  states = [program.init(jax.random.key(0)) for program in programs]
  taken: list[list[float]] = [[] for _ in programs]
  for _ in range(REPEATS.value + 1):
    for number, program in enumerate(programs):
      begin = time.perf_counter()
      states[number], metrics = program.step(states[number], batch)
      jax.block_until_ready(metrics['loss'])
      if 'guard' in metrics:
        int(metrics['guard']['fault'])
      jax.block_until_ready(states[number])
      taken[number].append(time.perf_counter() - begin)
  # The first round compiles.
  base = statistics.median(taken[0][1:])
  for name, spent in zip(ways, taken, strict=True):
    ratios = [mine / other for mine, other in zip(spent[1:], taken[0][1:], strict=True)]
    median = statistics.median(spent[1:])
    print(
      f'{name:<28} {median / base:6.3f} × no guard (of pairs {statistics.median(ratios):.3f})'
      f'  {1e3 * median:8.1f} ms a step'
    )


if __name__ == '__main__':
  app.run(main)
