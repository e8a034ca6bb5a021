"""Runs a real pipeline of two processes, a core each, and compares it with what was predicted.

  python -m experiments.pipeline_schedules.measure [--microbatches=4,8] [--rounds=9] [--output=FILE]

The orders are those of the simulator, and so are the predictions, from costs that both processes
time beforehand, at the same time. Also compares the gradients with those of the same batch in one
process without a pipeline. The question and what was found are in README.md; plot.py draws it.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_jax.core.describe import table
from deepseek_jax.core.tree import flatten
from deepseek_jax.pods.schedule.check import check_timeline
from deepseek_jax.pods.schedule.kinds import GPipe, OneFOneB, ZeroBubbleH1, ZeroBubbleH2
from deepseek_jax.pods.schedule.plan import Cost
from deepseek_jax.pods.schedule.simulate import Timeline, simulate
from experiments.pipeline_schedules import worker

STAGES, ROWS = 2, 2
KINDS = (GPipe(), OneFOneB(), ZeroBubbleH1(), ZeroBubbleH2())


class Pipeline:
  """Two processes, and how to speak to them."""

  def __init__(self, cut: Sequence[tuple[int, int]], counts: list[int], tiny: bool = False):
    """Starts them and waits until they are ready; `tiny` is the model for tests."""
    self.tiny = tiny
    context = multiprocessing.get_context('spawn')
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < STAGES:
      raise SystemExit(f'found {len(cores)} core; a pipeline of {STAGES} wants one each')
    left, right = context.Pipe()
    neighbours = ((None, left), (right, None))
    self.parents, self.processes = [], []
    for chunk in range(STAGES):
      mine, theirs = context.Pipe()
      arguments = (cores[chunk], chunk, STAGES - 1, theirs, neighbours[chunk])
      process = context.Process(target=worker.work, args=arguments, daemon=True)
      process.start()
      mine.send((cut[chunk], counts, ROWS, tiny))
      self.parents.append(mine)
      self.processes.append(process)
    self.answers()

  def ask(self, *commands: tuple) -> list[Any]:
    """Sends a command to each process, and returns their answers."""
    for parent, command in zip(self.parents, commands, strict=True):
      parent.send(command)
    return self.answers()

  def answers(self) -> list[Any]:
    """Waits for an answer of each process."""
    found = []
    for parent, process in zip(self.parents, self.processes, strict=True):
      while not parent.poll(1):
        if not process.is_alive():
          raise SystemExit(f'a stage ended with code {process.exitcode}')
      found.append(parent.recv())
    return found

  def close(self) -> None:
    """Ends the processes."""
    for parent, process in zip(self.parents, self.processes, strict=True):
      parent.send(('stop',))
      process.join(30)


def measured_shares(answers: list[list]) -> tuple[float, list[float]]:
  """Returns the seconds of a step, and the share of them that each stage does not compute."""
  begin = min(event[2] for events in answers for event in events)
  end = max(event[3] for events in answers for event in events)
  busy = [sum(stop - start for _, _, start, stop in events) for events in answers]
  return end - begin, [1 - seconds / (end - begin) for seconds in busy]


def costs_of(pipeline: Pipeline, repeats: int) -> tuple[tuple[Cost, ...], float]:
  """Times the programs of both stages at the same time, and a transfer."""
  timed = pipeline.ask(*[('time', repeats)] * STAGES)
  config = _experiment(pipeline.tiny)
  like = np.ones((ROWS, config.data.length, config.model.width), np.float32)
  transfer = statistics.mean(pipeline.ask(*[('transfer', like, 3 * repeats)] * STAGES))
  costs = tuple(
    Cost(
      forward=seconds['F'],
      backward_input=seconds['B'],
      backward_weight=seconds['W'],
      backward=seconds['BW'],
    )
    for seconds in timed
  )
  return costs, transfer


def run_kinds(pipeline: Pipeline, microbatches: int, rounds: int) -> list[dict[str, Any]]:
  """Runs every kind in turns; returns a row a kind."""
  costs, transfer = costs_of(pipeline, 9)
  timelines: dict[str, Timeline] = {}
  for kind in KINDS:
    plan = kind.plan(STAGES, microbatches, costs)
    timelines[repr(kind)] = simulate(plan, costs, transfer)
    check_timeline(timelines[repr(kind)])
  runs: dict[str, list] = {name: [] for name in timelines}
  gradients = {}
  for turn in range(rounds + 1):
    for name, timeline in timelines.items():
      orders = [[slot[0] for slot in order] for order in timeline.plan.orders]
      answers = pipeline.ask(*[('run', microbatches, order) for order in orders])
      found = pipeline.ask(*[('gradients',)] * STAGES)
      if turn == 0:
        gradients[name] = found
      else:
        runs[name].append((*measured_shares(answers), answers))
  rows = []
  for name, timeline in timelines.items():
    steps = sorted(runs[name], key=lambda run: run[0])
    middle = steps[len(steps) // 2]
    begin = min(event[2] for events in middle[2] for event in events)
    idle = [statistics.mean(shares) for _, shares, _ in steps]
    rows.append(
      {
        'kind': name,
        'microbatches': microbatches,
        'rows': ROWS,
        'predicted_seconds': timeline.makespan,
        'predicted_idle': list(timeline.bubbles),
        'seconds': [seconds for seconds, _, _ in runs[name]],
        'idle': [shares for _, shares, _ in runs[name]],
        'median_idle': statistics.median(idle),
        'gradient_error': gradient_error(gradients[name], microbatches, pipeline.tiny),
        'costs': [vars(cost) for cost in costs],
        'transfer': transfer,
        'events': [
          [(kind, m, start - begin, end - begin) for kind, m, start, end in events]
          for events in middle[2]
        ],
      }
    )
  return rows


def gradient_error(
  found: list[dict[str, Any]], microbatches: int, tiny: bool = False
) -> dict[str, Any]:
  """Compares summed gradients with those of one process: largest difference over largest entry."""
  import jax

  from deepseek_jax.models.decoder import canonical, plan_segments

  segments = plan_segments(_experiment(tiny).model)
  reference = canonical(_reference(microbatches, tiny), segments)
  sums: dict[str, np.ndarray] = {}
  for stage in found:
    for unit_address, tree in stage.items():
      leaves = flatten(tree) if isinstance(tree, dict) else {'': tree}
      for address, value in leaves.items():
        name = f'{unit_address}/{address}'.rstrip('/')
        sums[name] = sums[name] + value if name in sums else value
  expected = flatten(jax.device_get(reference))
  if set(sums) != set(expected):
    raise SystemExit(f'gradients of other weights: {sorted(set(sums) ^ set(expected))}')
  errors = {
    name: float(np.abs(sums[name] - value).max() / np.abs(value).max())
    for name, value in expected.items()
    if np.abs(value).max() > 0
  }
  worst = max(errors, key=lambda name: errors[name])
  total = np.sqrt(sum(float(np.sum((sums[n] - v) ** 2)) for n, v in expected.items()))
  norm = np.sqrt(sum(float(np.sum(v**2)) for v in expected.values()))
  return {'worst': errors[worst], 'where': worst, 'of_norm': float(total / norm)}


_REFERENCES: dict[tuple[int, bool], Any] = {}


def _experiment(tiny: bool = False) -> Any:
  from experiments.pipeline_schedules import model

  return model.experiment(tiny)


def _reference(microbatches: int, tiny: bool) -> Any:
  """Gradients of the whole batch in this process, by the objective that training has."""
  if (microbatches, tiny) in _REFERENCES:
    return _REFERENCES[microbatches, tiny]
  import flax.linen as nn
  import jax
  import jax.numpy as jnp

  from deepseek_jax.models.decoder import init_variables
  from deepseek_jax.train.objective import batch_context, training_loss
  from experiments.pipeline_schedules import model

  config = _experiment(tiny)
  decoder = config.model.build(dtype=jnp.float32)
  variables = jax.jit(lambda: nn.meta.unbox(init_variables(decoder, jax.random.key(config.seed))))()
  batch = jax.tree.map(jnp.asarray, model.batch_of(config, microbatches * ROWS))
  weight = config.objective.build(config.train_steps)(jnp.int32(0))

  def loss(params: Any) -> jax.Array:
    context = batch_context(batch, config.rules)
    given = {'params': params, 'buffers': variables['buffers']}
    totals = model.totals_of(config, batch)
    return training_loss(decoder, given, batch, totals, weight, context, config.objective.chunk)[0]

  found = jax.device_get(jax.jit(jax.grad(loss))(variables['params']))
  _REFERENCES[microbatches, tiny] = found
  return found


def report(rows: Sequence[dict[str, Any]]) -> str:
  """Returns a table, a line for each kind and number of microbatches."""
  lines = []
  for row in rows:
    means = sorted(statistics.mean(shares) for shares in row['idle'])
    seconds = sorted(row['seconds'])
    lines.append(
      (
        row['microbatches'],
        row['kind'],
        f'{statistics.mean(row["predicted_idle"]):.1%}',
        f'{statistics.median(means):.1%} ({means[0]:.1%}–{means[-1]:.1%})',
        f'{1e3 * row["predicted_seconds"]:.0f}',
        f'{1e3 * statistics.median(seconds):.0f} ({1e3 * seconds[0]:.0f}–{1e3 * seconds[-1]:.0f})',
        f'{row["gradient_error"]["worst"]:.1e}',
      )
    )
  heads = ('microbatches', 'kind', 'idle, predicted', 'idle, measured')
  heads += ('ms, predicted', 'ms, measured', 'gradients')
  return table(lines, heads)


def main() -> None:
  """Runs everything and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--microbatches', default='4,8')
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--cut', type=int, default=6, help='units of the first stage')
  parser.add_argument('--output', type=pathlib.Path, default=pathlib.Path('results.jsonl'))
  arguments = parser.parse_args()
  from deepseek_jax.pods.schedule.units import model_units

  units = len(model_units(_experiment()))
  cut = ((0, arguments.cut), (arguments.cut, units))
  counts = [int(count) for count in arguments.microbatches.split(',')]
  pipeline = Pipeline(cut, counts)
  rows = [row for count in counts for row in run_kinds(pipeline, count, arguments.rounds)]
  pipeline.close()
  lines = (json.dumps(row) + '\n' for row in rows)
  arguments.output.write_text(''.join(lines), encoding='utf-8')
  print(report(rows))


if __name__ == '__main__':
  main()
