"""Answers that are right in rows up to 16,384 symbols, by task and length.

  python -m experiments.recall.reach --runs=runs/recall_kinds [--lengths=2048,4096,8192,16384]
  python -m experiments.recall.reach --rows=FILE [--out=FOLDER]

Asks every run of the sweep for pairs that stand at the beginning of a row (`multi_query`) and for
pairs hidden anywhere in it (`needle`). Writes rows.jsonl, prints a table of it, and draws reach.svg
and reach.png; with --rows, from those of earlier. The question and what was found are in README.md.
"""

import argparse
import dataclasses
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure

from deepseek_jax import lab
from deepseek_jax.data.recall import MultiQuery, Needle, Recall, RecallData
from deepseek_jax.hub import CACHE_DIR, Pretrained
from deepseek_jax.lab.picture import COLOURS
from deepseek_jax.lab.recall import recall_by_distance
from experiments import reading
from experiments.reading import Row

TOKENS, ROWS = 2**16, 8
"""Symbols read of each kind of row, and rows of it at least; a row has eight questions."""
LONG = 8192
"""Symbols of a row beyond which only needles are asked for, of the first seed: rows of twice as
many take half of all the time."""


def tasks(data: Recall) -> dict[str, MultiQuery | Needle]:
  """Returns what is asked: pairs that begin the row, anywhere after them; needles, at the end."""
  pairs = data.task.pairs
  return {
    'multi_query': MultiQuery(pairs=pairs, questions=pairs, power=1.0),
    'needle': Needle(pairs=pairs),
  }


def share_right(model: Pretrained, task: MultiQuery | Needle, length: int) -> dict[str, Any]:
  """Returns the share of right answers in rows of `length`, in all and by distance."""
  config = model.experiment.data
  assert isinstance(config, Recall)
  rows = max(TOKENS // length, ROWS)
  config = dataclasses.replace(
    config, task=task, length=length, batch_size=max(8192 // length, 1), heldout_rows=rows
  )
  data = config.prepare(CACHE_DIR.expanduser())
  assert isinstance(data, RecallData)
  found = recall_by_distance(model.decoder, model.variables, data)
  asked = sum(entry.asked for entry in found)
  return {
    'asked': asked,
    'right': sum(entry.right * entry.asked for entry in found) / asked,
    'by_distance': {str(entry.nearest): round(entry.right, 4) for entry in found},
  }


def measure(folder: pathlib.Path, given: argparse.Namespace) -> Iterator[Row]:
  """Yields the share of right answers of a run, by task and length."""
  model = lab.from_pretrained(folder)
  assert isinstance(model.experiment.data, Recall)
  for name, task in tasks(model.experiment.data).items():
    for length in map(int, given.lengths.split(',')):
      if length <= LONG or (name == 'needle' and folder.name == 'seed_0'):
        yield {'task': name, 'length': length, **share_right(model, task, length)}


def grouped(rows: list[dict[str, Any]], task: str) -> dict[str, dict[int, list[float]]]:
  """Returns variant → length → shares, a number a seed."""
  found: dict[str, dict[int, list[float]]] = {}
  for row in rows:
    if row['task'] == task:
      found.setdefault(row['variant'], {}).setdefault(row['length'], []).append(row['right'])
  return found


def table(rows: list[dict[str, Any]]) -> str:
  """Returns Markdown tables, one a task: mean over seeds ± standard deviation."""
  parts = []
  for task in dict.fromkeys(row['task'] for row in rows):
    found = grouped(rows, task)
    lengths = sorted({length for shares in found.values() for length in shares})
    lines = [
      f'| {task}, right answers | {" | ".join(f"{length:,}" for length in lengths)} |',
      '|---|' + '---:|' * len(lengths),
    ]
    for name, shares in found.items():
      cells = []
      for length in lengths:
        values = shares.get(length, [])
        spread = f' ± {statistics.stdev(values):.1%}' if len(values) > 1 else ''
        cells.append(f'{statistics.mean(values):.1%}{spread}' if values else '—')
      lines.append(f'| {name} | {" | ".join(cells)} |')
    parts.append('\n'.join(lines))
  return '\n\n'.join(parts)


def draw(rows: list[dict[str, Any]], folder: pathlib.Path) -> None:
  """Draws right answers against length, a square a task: mean and range of the seeds."""
  names = list(dict.fromkeys(row['task'] for row in rows))
  figure = Figure(figsize=(8, 3.8), layout='constrained')
  grid = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
  for axes, task in zip(grid, names):
    for colour, (name, shares) in zip(COLOURS, grouped(rows, task).items()):
      lengths = sorted(shares)
      middle = [statistics.mean(shares[length]) for length in lengths]
      axes.plot(lengths, middle, color=colour, marker='o', ms=3, lw=1.2, label=name)
      low, high = ([edge(shares[n]) for n in lengths] for edge in (min, max))
      axes.fill_between(lengths, low, high, color=colour, alpha=0.15)
    axes.set_xscale('log', base=2)
    axes.set_ylim(-0.02, 1.02)
    axes.set_title(task, fontsize=9)
    axes.set_xlabel('symbols in a row')
    axes.spines[['top', 'right']].set_visible(False)
  grid[0].set_ylabel('right answers')
  figure.legend(*grid[0].get_legend_handles_labels(), loc='outside right upper', frameon=False)
  figure.savefig(folder / 'reach.svg', metadata={'Date': None})
  figure.savefig(folder / 'reach.png', dpi=120)


def show(rows: list[Row], folder: pathlib.Path) -> str:
  """Draws the rows, and returns a table of them."""
  draw(rows, folder)
  return table(rows)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--lengths', default='2048,4096,8192,16384')
  reading.main(parser, measure, show)
