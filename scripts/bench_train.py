"""Training speed of `configs/bench_107m.py`, beside its roof on this machine and beside a peer.

  python scripts/bench_train.py [--torch_python=VENV/bin/python] [--rounds=7] [--out=result.json]

In each round our step, every matrix product of the step alone (the composed roof), and the peer's
steps (transformers on torch, in an environment of its own with torch and transformers) take turns,
so that all meet the same machine. Every contestant has a process of its own, which sleeps while
others run. Figures are medians of the rounds.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

from absl import app, flags

from scripts.contestant import ROOT, Contestant
from scripts.random_batch import random_batch

START = time.perf_counter()
ROUNDS = flags.DEFINE_integer('rounds', 7, 'rounds that count')
WARMUP = flags.DEFINE_integer('warmup', 5, 'rounds before them: allocators take as long to settle')
TORCH_PYTHON = flags.DEFINE_string('torch_python', None, 'interpreter with torch, transformers')
PEERS = flags.DEFINE_list('peers', ['float32/grouped_mm'], 'precision/experts of each peer')
PRECISION = flags.DEFINE_enum('precision', 'fastest', ['fastest', 'float32', 'bfloat16'], 'ours')
KEEP_MEMORY = flags.DEFINE_bool('keep_memory', True, 'keep freed memory, as training does')
OUT = flags.DEFINE_string('out', None, 'file for all figures, as JSON')
WORKER = flags.DEFINE_enum('worker', None, ['step', 'roof'], 'used by the script itself')


def main(argv: list[str]) -> None:
  """Runs all contestants in turn and prints the table."""
  del argv
  if WORKER.value:
    work(WORKER.value)
    return
  precision = choose_precision()
  ours = [sys.executable, '-m', 'scripts.bench_train', f'--precision={precision}']
  ours.append(f'--keep_memory={KEEP_MEMORY.value}')
  contestants = {'ours': Contestant([*ours, '--worker=step'])}
  contestants['roof'] = Contestant([*ours, '--worker=roof'])
  if TORCH_PYTHON.value:
    for peer in PEERS.value:
      file = str(ROOT / 'scripts/bench_train_torch.py')
      command = [TORCH_PYTHON.value, file, *peer.split('/'), str(os.cpu_count())]
      contestants[f'transformers {peer}'] = Contestant(command)
  for number in range(WARMUP.value + ROUNDS.value):
    for contestant in contestants.values():
      contestant.step()
    rates = (f'{name} {c.rows[-1][0]:.2f} s' for name, c in contestants.items())
    print(f'round {number - WARMUP.value + 1}: ' + ', '.join(rates), flush=True)
  report(contestants, precision)
  for contestant in contestants.values():
    contestant.close()


def report(contestants: dict[str, Contestant], precision: str) -> None:
  """Prints the table and writes the figures."""
  from configs.bench_107m import get_config

  data = get_config().data
  tokens = data.batch_size * data.length
  ours, roof = contestants['ours'], contestants['roof']
  parameters, import_seconds, compile_seconds = ours.facts
  first = compile_seconds + ours.rows[0][0]
  print(f'\n{parameters:,.0f} parameters, {tokens} tokens a step, ours in {precision}')
  print(f'{"":<34} tokens/s (quartiles)   best   ours / it   peak memory')
  mine = ours.seconds(WARMUP.value)
  for name, contestant in contestants.items():
    spent = contestant.seconds(WARMUP.value)
    low, middle, high = (tokens / s for s in reversed(statistics.quantiles(spent, n=4)))
    ratio = statistics.median(other / own for own, other in zip(mine, spent, strict=True))
    memory = f'{contestant.rows[-1][2] / 1e9:.1f} GB' if name != 'roof' else ''
    best = tokens / min(spent)
    print(
      f'{name:<34} {middle:6.0f} ({low:.0f} to {high:.0f})  {best:8.0f} {ratio:8.2f}       {memory}'
    )
  best_roof = roof.rows[-1][1]
  print(
    f'roof of best times of each product: {tokens / best_roof:.0f} tokens/s; our median reaches '
    f'{best_roof / statistics.median(mine):.0%}, our best {best_roof / min(mine):.0%}'
  )
  print(
    f'ours: import {import_seconds:.1f} s, then build and compile {compile_seconds:.1f} s, '
    f'with the first step {first:.1f} s'
  )
  if OUT.value:
    figures = {
      name: {'facts': c.facts, 'rows': c.rows, 'ready_seconds': c.ready_seconds}
      for name, c in contestants.items()
    }
    pathlib.Path(OUT.value).write_text(json.dumps(figures, indent=1))


def choose_precision() -> str:
  """Returns the precision asked for, measured in a process that ends before the others start."""
  if PRECISION.value != 'fastest':
    return PRECISION.value
  code = 'from deepseek_jax.train.throughput import fastest_precision as f; print(f()[0])'
  result = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True, text=True
  )
  return result.stdout.split()[-1]


def work(kind: str) -> None:
  """Answers to `step` on standard input, as one contestant."""
  from absl import logging

  from deepseek_jax.core.allocator import keep_freed_memory

  logging.set_verbosity(logging.WARNING)
  if KEEP_MEMORY.value:
    keep_freed_memory()
  import jax

  from configs.bench_107m import get_config
  from deepseek_jax.core.precision import BFloat16, Float32
  from deepseek_jax.train.step import build_program

  imported = time.perf_counter() - START
  experiment = get_config()
  chosen = Float32() if PRECISION.value == 'float32' else BFloat16()
  experiment = dataclasses.replace(experiment, precision=chosen)
  start = time.perf_counter()
  if kind == 'roof':
    answer = roof_contestant(experiment)
    parameters = 0
  else:
    program = build_program(experiment, jax.devices()[:1])
    shapes = (program.abstract_state, program.abstract_batch())
    compiled = program.step.compile(*shapes)
    answer = step_contestant(program, compiled)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.params))
    start += answer.pop()
  print('ready', parameters, imported, time.perf_counter() - start, flush=True)
  for line in sys.stdin:
    if line.strip() != 'step':
      break
    print('step', *answer[0](), flush=True)


def step_contestant(program: Any, compiled: Any) -> list[Any]:
  """Returns a function that makes one step, and the seconds that initialisation took."""
  import jax

  from deepseek_jax.train.throughput import peak_memory_bytes

  start = time.perf_counter()
  state = jax.block_until_ready(program.init(jax.random.key(0)))
  init_seconds = time.perf_counter() - start
  batch = jax.device_put(random_batch(program.experiment), program.batch_sharding)
  held = [state]
  del state

  def step() -> list[float]:
    start = time.perf_counter()
    held[0], metrics = compiled(held[0], batch)
    jax.block_until_ready((held[0], metrics))
    return [time.perf_counter() - start, float(metrics['loss']), float(peak_memory_bytes())]

  return [step, init_seconds]


def roof_contestant(experiment: Any) -> list[Any]:
  """Returns a function that times every product of the step once and adds them up."""
  import jax

  from deepseek_jax.models.cost import training_flops
  from deepseek_jax.train.step import build_program
  from deepseek_jax.train.summary import experiment_weights
  from scripts.composed_roof import EvenLoads, Roof, products_of

  program = build_program(experiment, jax.devices()[:1])
  per_token = training_flops(experiment.model, experiment_weights(program), experiment.data.length)
  model = experiment.model
  even: Any = dataclasses.replace(model.feed_forward, dispatch=EvenLoads())
  model = dataclasses.replace(model, feed_forward=even)
  program = build_program(dataclasses.replace(experiment, model=model), jax.devices()[:1])
  step = program.step
  with jax.set_mesh(program.mesh):
    counts = products_of(
      step.function, program.abstract_state, program.abstract_batch(), *step.constants
    )
  flops = sum(count * product.flops for product, count in counts.items())
  tokens = experiment.data.batch_size * experiment.data.length
  print(f'{flops / 1e9:.0f} GFLOP of products a step, {per_token * tokens / 1e9:.0f} by the model')
  roof = Roof(counts)

  def measure() -> list[float]:
    roof.round()
    now = roof.step_seconds(lambda seconds: seconds[-1])
    # The first round warms up.
    best = roof.step_seconds(lambda seconds: min(seconds[1:] or seconds))
    return [now, best]

  return [measure]


if __name__ == '__main__':
  app.run(main)
