"""What sharing saves in a sweep: one compiled step for many runs, and many seeds in one program.

  python scripts/bench_sweep.py --what=compile [--config=quickstart] [--rounds=3]
  python scripts/bench_sweep.py --what=seeds [--config=quickstart] [--seeds=3] [--rounds=7]

compile: from a fresh folder of compiled programs, the seconds that a process takes to get its step
ready: the first run of a sweep; a run with another learning rate, weight decay and bias rate; and,
to see that the folder does decide by content, a run with another beta.
seeds: a step of n seeds as one vmapped program beside n steps of one seed after another; they take
turns, and each is waited for.
"""

import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags

WHAT = flags.DEFINE_enum('what', 'compile', ['compile', 'seeds', 'child'], 'what to time')
CONFIG = flags.DEFINE_string('config', 'quickstart', 'a config of configs/')
ROUNDS = flags.DEFINE_integer('rounds', 3, 'rounds; medians count', lower_bound=1)
SEEDS = flags.DEFINE_integer('seeds', 3, 'seeds of the vmapped program', lower_bound=1)
RUN = flags.DEFINE_enum('run', 'first', ['first', 'values', 'beta'], 'of the child')

CHANGES: dict[str, dict[str, Any]] = {
  'first': {},
  'values': {'optimizer.peak_lr': 1e-3, 'optimizer.weight_decay': 0.05, 'balance.rate': 2e-3},
  'beta': {'optimizer.beta2': 0.99},
}
NAMES = {
  'first': 'the first run',
  'values': 'another learning rate, decay and bias rate',
  'beta': 'another beta',
}


def experiment() -> Any:
  """Returns the config, with a precision that does not depend on the machine."""
  from deepseek_jax.core.load import load_config
  from deepseek_jax.core.precision import Float32
  from deepseek_jax.train.experiment import resolved

  return resolved(load_config(CONFIG.value), Float32())


def child() -> None:
  """Prints the seconds until the step of one run is ready to be called."""
  import jax

  from deepseek_jax.core.override import override
  from deepseek_jax.train.step import build_program

  chosen = override(experiment(), CHANGES[RUN.value])[0]
  start = time.perf_counter()
  program = build_program(chosen, jax.devices()[:1])
  program.step.compile(program.abstract_state, program.abstract_batch())
  print(time.perf_counter() - start)


def time_compile() -> None:
  """Starts a process for each run of each round."""
  taken: dict[str, list[float]] = {run: [] for run in CHANGES}
  for _ in range(ROUNDS.value):
    with tempfile.TemporaryDirectory() as folder:
      for run, seconds in taken.items():
        words = [sys.executable, sys.argv[0], '--what=child', f'--config={CONFIG.value}']
        found = subprocess.run(
          [*words, f'--run={run}'],
          env={**os.environ, 'JAX_COMPILATION_CACHE_DIR': folder},
          stdout=subprocess.PIPE,
          text=True,
          check=True,
        )
        seconds.append(float(found.stdout))
  base = statistics.median(taken['first'])
  for run, seconds in taken.items():
    median = statistics.median(seconds)
    print(f'{NAMES[run]:<44} {median / base:5.2f} × the first run  {median:6.1f} s')


def time_seeds() -> None:
  """Times a step of several seeds as one program, beside as many steps of one."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.sharding.mesh import MeshConfig
  from deepseek_jax.train.step import build_program, make_step

  chosen = dataclasses.replace(experiment(), mesh=MeshConfig())
  program, count = build_program(chosen, jax.devices()[:1]), SEEDS.value
  optimizer = chosen.optimizer.build(chosen.schedule.build(chosen.train_steps), program.axes)
  step = make_step(chosen, program.decoder, optimizer, program.axes)
  with tempfile.TemporaryDirectory() as cache:
    source = chosen.data.prepare(pathlib.Path(cache)).train_batches(0)
    batches = [jax.device_put(next(source), program.batch_sharding) for _ in range(count)]
  states = [program.init(jax.random.key(seed)) for seed in range(count)]
  stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
  together, batch = jax.tree.map(stack, *states), jax.tree.map(stack, *batches)
  many = jax.jit(jax.vmap(step), donate_argnums=0)
  taken: dict[str, list[float]] = {'one after another': [], 'one program': []}
  for _ in range(ROUNDS.value + 1):
    begin = time.perf_counter()
    for seed in range(count):
      states[seed], metrics = program.step(states[seed], batches[seed])
      jax.block_until_ready((states[seed], metrics))
    taken['one after another'].append(time.perf_counter() - begin)
    begin = time.perf_counter()
    with jax.set_mesh(program.mesh):
      together, metrics = many(together, batch)
    jax.block_until_ready((together, metrics))
    taken['one program'].append(time.perf_counter() - begin)
  pairs = zip(*(seconds[1:] for seconds in taken.values()), strict=True)
  ratio = statistics.median(mine / other for other, mine in pairs)
  first = taken['one program'][0] / taken['one after another'][0]
  print(f'{count} seeds as one program: {ratio:.2f} × the time of one after another, a step')
  print(f'first step, compilation included: {first:.2f} ×')


def main(argv: list[str]) -> None:
  """Runs the benchmark."""
  del argv
  {'compile': time_compile, 'seeds': time_seeds, 'child': child}[WHAT.value]()


if __name__ == '__main__':
  app.run(main)
