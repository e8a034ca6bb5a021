"""An expert breaks in the middle of a run: with a breaker, without one, and not at all.

  python -m experiments.expert_breaker.measure [--steps=160] [--seeds=3] [--output=FOLDER]
  python -m experiments.expert_breaker.measure --rows=FILE [--output=FOLDER]

Every number of one expert's matrix becomes NaN between two steps (as a flipped bit, a bad device or
an update gone wrong would make it). Writes rows.jsonl, prints a table of it, and draws
curve.svg and curve.png; with --rows, from those of earlier. The question and what was found are in
README.md.
"""

import argparse
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from deepseek_jax.core.override import override
from deepseek_jax.hub import CACHE_DIR
from deepseek_jax.layers.moe.breaker import Breaker
from deepseek_jax.models.decoder import canonical, grouped, plan_segments
from deepseek_jax.models.plan import Segment
from deepseek_jax.train.evaluate import evaluate
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.report import layer_loads
from deepseek_jax.train.step import Program, build_program
from experiments.balance_kinds import sweep as balance_kinds

LAYER, EXPERT = 2, 5
VARIANTS = {'healthy': None, 'no breaker': None, 'breaker': Breaker(cooldown=30, trial=10)}
"""What breaks in all but the first is expert 5 of layer 2, after half of the steps."""


def experiment(name: str, steps: int) -> Experiment:
  """Returns the model of `balance_kinds` with or without a breaker."""
  changes = {
    'name': 'expert_breaker',
    'balance.rate': 1e-2,
    'model.feed_forward.breaker': VARIANTS[name],
    'train_steps': steps,
  }
  return override(balance_kinds.base(), changes)[0]


def break_expert(params: Any, segments: tuple[Segment, ...]) -> Any:
  """Returns the parameters with one matrix of one expert made NaN."""
  tree = canonical(params, segments)
  matrices = tree['layers'][str(LAYER)]['feed_forward']
  matrices['up'] = matrices['up'].at[EXPERT].set(jnp.nan)
  return grouped(tree, segments)


def run(program: Program, data: Any, seed: int, broken: bool) -> dict[str, Any]:
  """Trains once; returns curves, and what is left of the run."""
  config = program.experiment
  segments = plan_segments(config.model, config.remat)
  state, batches = program.init(jax.random.key(seed)), data.train_batches(1000 * seed)
  losses, skipped, shares, seconds = [], 0, [], []
  for number in range(config.train_steps):
    if broken and number == config.train_steps // 2:
      params = break_expert(state.params, segments)
      state = state.replace(params=params)
    batch = jax.device_put(next(batches), program.batch_sharding)
    begin = time.perf_counter()
    state, metrics = program.step(state, batch)
    jax.block_until_ready(metrics['loss'])
    seconds.append(round(time.perf_counter() - begin, 4))
    load = layer_loads(jax.device_get(metrics['observed']), segments)[f'layers/{LAYER}']
    losses.append(float(metrics['loss']))
    shares.append(float(load[EXPERT] / load.sum()))
    skipped += int(metrics['guard']['fault']) > 0
  bits = evaluate(program, state.params, state.buffers, data.heldout).bits_per_byte
  return {
    'seed': seed,
    'skipped_steps': skipped,
    'bits_per_byte': bits if np.isfinite(bits) else None,
    'loss': [loss if np.isfinite(loss) else None for loss in losses],
    'share': [round(share, 5) for share in shares],
    'seconds': seconds,
  }


def draw(rows: list[dict[str, Any]], folder: pathlib.Path) -> None:
  """Draws loss, what it is above the healthy run of its seed, and the share of the expert."""
  figure = Figure(figsize=(7.2, 7.2), layout='constrained')
  loss, gap, share = figure.subplots(3, 1, sharex=True)
  colours = {'healthy': '#5b6472', 'no breaker': '#c05621', 'breaker': '#2b6cb0'}
  healthy = {row['seed']: numbers(row['loss']) for row in rows if row['variant'] == 'healthy'}
  for row in rows:
    mine = numbers(row['loss'])
    twin = healthy.get(row['seed'], np.full_like(mine, np.nan))
    for axes, values in ((loss, mine), (gap, mine - twin), (share, numbers(row['share']))):
      label = row['variant'] if row['seed'] == 0 else None
      axes.plot(values, color=colours[row['variant']], linewidth=0.9, alpha=0.8, label=label)
  for axes in (loss, gap, share):
    axes.axvline(len(rows[0]['loss']) // 2, color='black', linewidth=0.6, linestyle=':')
    axes.spines[['top', 'right']].set_visible(False)
  loss.set_ylabel('training loss, nats a token')
  gap.set_ylabel('less the healthy run’s')
  share.set_ylabel(f'share of choices,\nexpert {EXPERT} of layer {LAYER}')
  share.set_xlabel('step')
  loss.legend(frameon=False)
  for kind in ('svg', 'png'):
    figure.savefig(folder / f'curve.{kind}', dpi=120)


def numbers(values: list[float | None]) -> np.ndarray:
  """Returns a curve [steps] float64; None is what was not finite."""
  return np.array([np.nan if value is None else value for value in values], np.float64)


def recovery(row: dict[str, Any], healthy: list[dict[str, Any]]) -> int | None:
  """Returns the steps from the fault to the first whose loss is as if there had been none.

  That is: as far from the healthy run of the same seed as healthy runs are from each other, in
  standard deviations over seeds at that step, or nearer. None is never.
  """
  twin = next(other for other in healthy if other['seed'] == row['seed'])
  half = len(row['loss']) // 2
  for number in range(half, len(row['loss'])):
    spread = statistics.stdev(other['loss'][number] for other in healthy)
    loss = row['loss'][number]
    if loss is not None and abs(loss - twin['loss'][number]) <= spread:
      return number - half
  return None


def table(rows: list[dict[str, Any]]) -> str:
  """Returns a Markdown table with a line for each run."""
  lines = [
    '| run | seed | bits a byte held out | steps skipped | lost steps to a healthy loss '
    '| first step after the fault, by the median step |',
    '|---|---:|---:|---:|---:|---:|',
  ]
  healthy = [row for row in rows if row['variant'] == 'healthy']
  for row in rows:
    half = len(row['seconds']) // 2
    slower = row['seconds'][half] / statistics.median(row['seconds'][1:])
    lost = recovery(row, healthy) if len(healthy) > 1 else None
    bits = 'not finite' if row['bits_per_byte'] is None else f'{row["bits_per_byte"]:.4f}'
    lines.append(
      f'| {row["variant"]} | {row["seed"]} | {bits} | {row["skipped_steps"]} '
      f'| {"never" if lost is None else lost} | {slower:.2f} |'
    )
  return '\n'.join(lines)


def main() -> None:
  """Makes rows or reads them, and shows them."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=160)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--output', type=pathlib.Path, default=pathlib.Path('runs/expert_breaker'))
  parser.add_argument('--rows', type=pathlib.Path)
  arguments = parser.parse_args()
  arguments.output.mkdir(parents=True, exist_ok=True)
  if arguments.rows is None:
    rows = run_all(arguments)
  else:
    rows = [json.loads(line) for line in arguments.rows.read_text(encoding='utf-8').splitlines()]
  draw(rows, arguments.output)
  print(table(rows))


def run_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
  """Runs every variant with every seed; what ran before is not lost to what fails later."""
  data = experiment('healthy', arguments.steps).data.prepare(CACHE_DIR.expanduser())
  rows = []
  for name in VARIANTS:
    program = build_program(experiment(name, arguments.steps), jax.devices()[:1])
    for seed in range(arguments.seeds):
      row = {'variant': name, **run(program, data, seed, broken=name != 'healthy')}
      rows.append(row)
      with (arguments.output / 'rows.jsonl').open('a', encoding='utf-8') as file:
        file.write(json.dumps(row) + '\n')
      print(
        f'{name}, seed {seed}: {row["bits_per_byte"]} bits a byte held out, '
        f'{row["skipped_steps"]} steps skipped',
        flush=True,
      )
  return rows


if __name__ == '__main__':
  main()
