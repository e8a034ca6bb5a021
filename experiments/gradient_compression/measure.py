"""Held-out loss and bytes of two replicas under each kind of reduction, three seeds each.

  python -m experiments.gradient_compression.measure [--steps=300] [--seeds=3]
      [--output=losses.json]

Prints a table; the rows go to the file as they come. The question and what was found are in
README.md.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax

from configs import tiny_mla
from deepseek_jax.core.describe import table
from deepseek_jax.lab.statistics import paired_difference
from deepseek_jax.optim.compression import Every, Exact, LocalSteps, Quantised
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.train.evaluate import evaluate
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.step import Program, build_program

BLOCK = 128
OUTER: dict[str, Any] = {'outer_rate': 0.7, 'momentum': 0.9}
"""The outer optimizer of DiLoCo; else what replicas have moved is taken as it is, in the mean."""
KINDS: dict[str, Any] = {
  'none': None,
  'exact': Exact(),
  'int8': Quantised(bits=8, block=BLOCK),
  'int8, no feedback': Quantised(bits=8, block=BLOCK, feedback=None),
  'int4': Quantised(bits=4, block=BLOCK),
  'int4, no feedback': Quantised(bits=4, block=BLOCK, feedback=None),
  'exact every 4': LocalSteps(interval=Every(steps=4)),
  'int4 every 4': LocalSteps(interval=Every(steps=4), exchange=Quantised(bits=4, block=BLOCK)),
  'exact every 4, DiLoCo': LocalSteps(interval=Every(steps=4), **OUTER),
  'int4 every 4, DiLoCo': LocalSteps(
    interval=Every(steps=4), exchange=Quantised(bits=4, block=BLOCK), **OUTER
  ),
}
BASELINE = 'none'
HELP = 'of these kinds, a semicolon for the comma in a name; others in the file are kept'


def experiment(reduction: Any, steps: int) -> Experiment:
  """Returns a small run of two replicas."""
  base = tiny_mla.get_config()
  return dataclasses.replace(
    base,
    name='gradient_compression',
    model=dataclasses.replace(base.model, width=64, mtp=None),
    data=dataclasses.replace(base.data, batch_size=16),
    schedule=WarmupStableDecay(warmup_steps=20, decay_fraction=0.3, final=0.05),
    train_steps=steps,
    mesh=MeshConfig(replica=2, data=1),
    reduction=reduction,
    guard=None,
  )


def run(program: Program, step: Any, data: Any, seed: int) -> dict[str, Any]:
  """Trains once; seeds differ in weights and in text."""
  state = program.init(jax.random.key(seed))
  batches = data.train_batches(seed * 1000)
  losses, errors, sent, began = [], [], 0.0, time.perf_counter()
  for _ in range(program.experiment.train_steps):
    state, metrics = step(state, jax.device_put(next(batches), program.batch_sharding))
    losses.append(float(metrics['loss']))
    sent += float(metrics.get('exchanged_bytes', 0.0))
    errors.append(float(metrics.get('exchange_error', 0.0)))
  seconds = time.perf_counter() - began
  found = evaluate(program, state.params, state.buffers, data.heldout, 64)
  return {
    'seed': seed,
    'heldout_loss': found.loss,
    'train_loss': statistics.mean(losses[-20:]),
    'exchanged_bytes': sent,
    'exchange_error': statistics.mean(errors),
    'seconds': seconds,
    'losses': [round(loss, 4) for loss in losses[4::5]],
  }


def report(rows: dict[str, list[dict[str, Any]]]) -> str:
  """Returns the table: losses, paired differences to the baseline, and bytes."""
  first = {row['seed']: row['heldout_loss'] for row in rows[BASELINE]}
  exact = statistics.mean(row['exchanged_bytes'] for row in rows['exact'])
  lines = []
  for name, found in rows.items():
    losses = [row['heldout_loss'] for row in found]
    apart = paired_difference({row['seed']: row['heldout_loss'] for row in found}, first)
    sent = statistics.mean(row['exchanged_bytes'] for row in found)
    lines.append(
      (
        name,
        f'{statistics.mean(losses):.4f} ({min(losses):.4f}–{max(losses):.4f})',
        '' if name == BASELINE else apart.text,
        f'{statistics.mean(row["exchange_error"] for row in found):.3f}',
        f'{sent / 1e6:.1f}' if sent else 'as exact',
        f'{exact / sent:.2f}' if sent else '1',
      )
    )
  headers = ('reduction', 'held-out nats', 'difference', 'error', 'MB sent', 'times less')
  return table(lines, headers)


def main() -> None:
  """Runs every kind with every seed."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=300)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--output', type=pathlib.Path, default=pathlib.Path('losses.json'))
  parser.add_argument('--kinds', default=','.join(KINDS).replace(', ', ';'), help=HELP)
  arguments = parser.parse_args()
  chosen = [name.replace(';', ', ') for name in arguments.kinds.split(',')]
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 2)
  rows: dict[str, list[dict[str, Any]]] = {}
  if arguments.output.exists():
    content = json.loads(arguments.output.read_text(encoding='utf-8'))
    assert content['steps'] == arguments.steps, 'the file has runs of another length'
    rows = content['rows']
  with tempfile.TemporaryDirectory() as cache:
    data = experiment(None, arguments.steps).data.prepare(pathlib.Path(cache))
    for name in chosen:
      program = build_program(experiment(KINDS[name], arguments.steps), jax.devices())
      step = program.step.compile(program.abstract_state, program.abstract_batch())
      rows[name] = [run(program, step, data, seed) for seed in range(arguments.seeds)]
      content = {'steps': arguments.steps, 'rows': rows}
      arguments.output.write_text(json.dumps(content) + '\n', encoding='utf-8')
      losses = ', '.join(f'{row["heldout_loss"]:.4f}' for row in rows[name])
      seconds = statistics.mean(row['seconds'] for row in rows[name])
      print(f'{name}: {losses} held out, {seconds:.0f} s a run', flush=True)
  print(report(rows))


if __name__ == '__main__':
  main()
