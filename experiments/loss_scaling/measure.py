"""Overflowed steps and lost gradients under each kind of loss scale, in one run set-up.

  python -m experiments.loss_scaling.measure [--steps=400] [--seeds=3] [--output=rows.jsonl]

Prints a table; the rows go to the file. The question and what was found are in README.md.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from configs import tiny_mla
from deepseek_jax.core.describe import table
from deepseek_jax.core.loss_scale import BackOff, GradientNorm, LossScale, Static
from deepseek_jax.core.precision import Float16
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import Constant
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.guard import KINDS
from deepseek_jax.train.objective import batch_context, batch_totals, training_loss
from deepseek_jax.train.step import Program, build_program

SCALES: dict[str, LossScale] = {
  'Static(1)': Static(scale=1.0),
  'Static(2^12)': Static(scale=2.0**12),
  'BackOff(interval=25)': BackOff(interval=25),
  'BackOff(interval=100)': BackOff(interval=100),
  'BackOff(interval=2000)': BackOff(),
  'GradientNorm()': GradientNorm(),
}
PROBE_STEPS = 25
"""Every so many steps, gradients are made in float32 too and compared with float16's range."""
ROUNDS_TO_ZERO = 2.0**-25
"""Half of the smallest float16."""
NORMAL = 2.0**-14
"""The smallest float16 that has all of its 11 bits."""


def experiment(scaling: LossScale, steps: int) -> Experiment:
  """Returns a run that is hard on the scale: full learning rate at once, gradients not clipped."""
  base = tiny_mla.get_config()
  return dataclasses.replace(
    base,
    name='loss_scaling',
    model=dataclasses.replace(base.model, mtp=None),
    optimizer=AdamW(peak_lr=3e-2, clip_norm=None),
    schedule=Constant(),
    train_steps=steps,
    precision=Float16(scaling=scaling),
    # Overflows are skipped without it too; spikes are to be met, not skipped.
    guard=None,
  )


def make_probe(config: Experiment) -> Callable[..., jax.Array]:
  """Returns `(params, buffers, batch, scale) -> shares` [2] of gradient entries.

  The first are lost to zero in float16, the second lose bits: they are below its normal range.
  """
  decoder = config.model.build(dtype=jnp.float32)

  def probe(params: Any, buffers: Any, batch: Any, scale: jax.Array) -> jax.Array:
    def loss(params):
      variables = {'params': params, 'buffers': buffers}
      context = batch_context(batch, config.rules)
      totals = batch_totals(batch, 0)
      chunk = config.objective.chunk
      return training_loss(decoder, variables, batch, totals, jnp.float32(0), context, chunk)[0]

    grads = jax.tree.leaves(jax.grad(loss)(params))
    limits = jnp.float32([ROUNDS_TO_ZERO, NORMAL])
    below = [
      jnp.sum((g != 0) & (jnp.abs(g) * scale < limits[:, None]), axis=1)
      for g in (grad.reshape(-1) for grad in grads)
    ]
    return sum(below) / sum(jnp.sum(g != 0) for g in grads)

  return jax.jit(probe)


def run(program: Program, probe: Callable[..., jax.Array], data: Any, seed: int) -> dict[str, Any]:
  """Trains once, and counts."""
  state = program.init(jax.random.key(seed))
  # Seeds differ in weights and in text.
  batches = data.train_batches(seed * 1000)
  overflows, shares, losses, scales = 0, [], [], []
  for number in range(program.experiment.train_steps):
    batch = jax.device_put(next(batches), program.batch_sharding)
    if number % PROBE_STEPS == 0:
      scale = state.guard.scaling.scale
      shares.append(probe(state.params, state.buffers, batch, scale).tolist())
    state, metrics = program.step(state, batch)
    overflows += KINDS[int(metrics['guard']['fault'])] == 'overflow'
    losses.append(float(metrics['loss']))
    scales.append(float(metrics['loss_scale']))
  return {
    'seed': seed,
    'steps': len(losses),
    'overflows': overflows,
    'lost_share': statistics.mean(lost for lost, _ in shares),
    'coarse_share': statistics.mean(coarse for _, coarse in shares),
    'median_scale': statistics.median(scales),
    'final_loss': statistics.mean(losses[-20:]),
  }


def spread(values: list[float], digits: int) -> str:
  """Returns 'mean (least–most)'."""
  mean, least, most = statistics.mean(values), min(values), max(values)
  return f'{mean:.{digits}f} ({least:.{digits}f}–{most:.{digits}f})'


def main() -> None:
  """Runs every kind with every seed."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=400)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--output', type=pathlib.Path, default=pathlib.Path('rows.jsonl'))
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as cache:
    data = experiment(Static(), arguments.steps).data.prepare(pathlib.Path(cache))
    probe = make_probe(experiment(Static(), arguments.steps))
    lines = []
    for name, scaling in SCALES.items():
      program = build_program(experiment(scaling, arguments.steps), jax.devices()[:1])
      rows = [run(program, probe, data, seed) for seed in range(arguments.seeds)]
      with arguments.output.open('a', encoding='utf-8') as file:
        file.writelines(json.dumps({'scaling': name, **row}) + '\n' for row in rows)
      columns = ((name, 0) for name in ('overflows', 'median_scale'))
      figures = [spread([row[key] for row in rows], digits) for key, digits in columns]
      for key in ('lost_share', 'coarse_share'):
        figures.append(spread([100 * row[key] for row in rows], 2))
      figures.append(spread([row['final_loss'] for row in rows], 3))
      lines.append((name, *figures))
      print(*lines[-1], sep=' | ', flush=True)
  headers = ('kind', 'overflows', 'median scale', 'lost, %', 'below 2^-14, %', 'final loss')
  print(table(lines, headers))


if __name__ == '__main__':
  main()
