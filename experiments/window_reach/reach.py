"""Bits per byte of held-out documents by position, far beyond the rows that a model was trained on.

  python -m experiments.window_reach.reach --runs=runs/reach [--length=32768] [--out=FOLDER]
  python -m experiments.window_reach.reach --rows=FILE [--out=FOLDER]

Reads the longest held-out documents whole with every run of the sweep, and with the models of
full attention once more through windows that they were not trained with, which the weights fit.
Writes rows.jsonl, prints a table of it, and draws reach.svg and reach.png; with --rows, from those
of earlier. The question and what was found are in README.md.
"""

import argparse
import itertools
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from deepseek_jax import lab
from deepseek_jax.hub import CACHE_DIR, Pretrained
from deepseek_jax.lab.picture import COLOURS
from experiments import reading
from experiments.reading import Row

EDGES = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
READ_THROUGH = {
  'all, read in 1024': 'Window(size=1024, sinks=4)',
  'all, read in 1024 without sinks': 'Window(size=1024, sinks=0)',
}
"""Windows put on models that were trained without."""


def long_documents(model: Pretrained, length: int) -> list[np.ndarray]:
  """Returns the first `length` tokens of the held-out documents that have as many."""
  cache = model.experiment.data.prepare(CACHE_DIR.expanduser()).heldout.cache
  offsets = np.asarray(cache.offsets)
  return [
    np.asarray(cache.tokens[start : start + length])
    for start, end in itertools.pairwise(offsets)
    if end - start >= length
  ]


@jax.jit
def bits(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns bits of each token after the first [T - 1] float32, from logits [T, V]."""
  chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), tokens[1:, None], axis=-1)
  return -chosen[:, 0] / jnp.log(2.0)


def by_position(model: Pretrained, documents: list[np.ndarray]) -> list[float]:
  """Returns the mean bits of a token in every range of positions; a token is a byte."""
  rows = np.stack([bits(model.logits(tokens), jnp.asarray(tokens)) for tokens in documents])
  ranges = itertools.pairwise(EDGES)
  return [float(rows[:, a:b].mean()) for a, b in ranges if a < rows.shape[1]]


def measure(folder: pathlib.Path, given: argparse.Namespace) -> Iterator[Row]:
  """Yields bits by position of a run, and of its weights read through windows."""
  model = lab.from_pretrained(folder)
  documents = long_documents(model, given.length)
  if not documents:
    raise SystemExit(f'no held-out document has {given.length:,} tokens; give a smaller --length')
  models, name = {}, folder.parent.name
  if name == 'all':
    models = {label: model.replace(attention=kind) for label, kind in READ_THROUGH.items()}
  for label, one in {name: model, **models}.items():
    yield {'variant': label, 'documents': len(documents), 'bits': by_position(one, documents)}


def grouped(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
  """Returns variant → bits [seeds, ranges]."""
  names = dict.fromkeys(row['variant'] for row in rows)
  return {name: np.array([row['bits'] for row in rows if row['variant'] == name]) for name in names}


def table(rows: list[dict[str, Any]]) -> str:
  """Returns a Markdown table: mean over seeds ± standard deviation, by position."""
  found = grouped(rows)
  count = max(len(values[0]) for values in found.values())
  heads = [f'{a:,}–{b - 1:,}' for a, b in itertools.pairwise(EDGES)][:count]
  lines = [
    f'| bits a byte at position | {" | ".join(heads)} |',
    '|---|' + '---:|' * count,
  ]
  for name, values in found.items():
    cells = []
    for column in values.T:
      spread = f' ± {statistics.stdev(column):.3f}' if len(column) > 1 else ''
      cells.append(f'{column.mean():.3f}{spread}')
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines)


def draw(rows: list[dict[str, Any]], trained: int, folder: pathlib.Path) -> None:
  """Draws bits by position: the mean of the seeds and their range."""
  figure = Figure(figsize=(7.2, 4.2), layout='constrained')
  axes = figure.subplots()
  for colour, (name, values) in zip(COLOURS, grouped(rows).items()):
    places = EDGES[1 : values.shape[1] + 1]
    axes.plot(places, values.mean(axis=0), color=colour, marker='o', ms=3, lw=1.2, label=name)
    axes.fill_between(places, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15)
  axes.axvline(trained, color='black', lw=0.6, ls=':')
  axes.annotate('rows of training', (trained, axes.get_ylim()[1]), fontsize=8, va='top')
  axes.set_xscale('log', base=2)
  axes.set_xlabel('position, end of the range')
  axes.set_ylabel('bits a byte, held out')
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False, fontsize=8)
  figure.savefig(folder / 'reach.svg', metadata={'Date': None})
  figure.savefig(folder / 'reach.png', dpi=120)


def show(rows: list[Row], folder: pathlib.Path) -> str:
  """Draws the rows, and returns a table of them."""
  draw(rows, 2048, folder)
  return table(rows)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--length', type=int, default=EDGES[-1])
  reading.main(parser, measure, show)
