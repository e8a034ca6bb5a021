"""What captions lose when a medium is missing, noise or another's, and where the weights go.

  python -m experiments.fusion_weights.measure --runs=runs/joined [--out=FOLDER]
  python -m experiments.fusion_weights.measure --rows=FILE [--out=FOLDER]

Held-out documents show two media, each followed by its caption. Of the second caption, whose words
can attend to both, it gives nats a token and the mean weight of the medium that it is about.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from deepseek_jax import lab
from deepseek_jax.data.batch import Batch
from deepseek_jax.data.packed_split import heldout_batches
from deepseek_jax.hub import CACHE_DIR
from deepseek_jax.infer.target import context_of, shuffled_media, target_scores
from deepseek_jax.layers.context import MEDIA
from experiments import reading
from experiments.reading import Row

ORDERS = (('image', 'sound'), ('sound', 'image'))
"""Of the first two sources of the sweep's mixture."""

CASES = ('as it is', 'other missing', 'other noise', 'own missing', 'own noise', "own another's")


def altered(batch: Batch, case: str, other: str, own: str, rng: np.random.Generator) -> Batch:
  """Returns a batch whose documents show something else.

  Args:
    batch: rows of documents with both media.
    case: one of `CASES`.
    other: kind of the medium that comes first.
    own: kind of the one that the second caption is about.
    rng: of noise.
  """
  if case == 'as it is':
    return batch
  kind, change = (other if case.startswith('other') else own), case.split()[1]
  media = batch.media[kind]
  if change == 'missing':
    media = media.replace(counts=np.zeros_like(media.counts))
  elif change == 'noise':
    values = np.asarray(media.values)
    noise = (
      rng.integers(0, 256, values.shape) if kind == 'image' else rng.uniform(-1, 1, values.shape)
    )
    media = media.replace(values=noise.astype(values.dtype))
  else:
    media = shuffled_media(batch).media[kind]
  return dataclasses.replace(batch, media=dict(batch.media) | {kind: media})


def second_part(batch: Batch) -> np.ndarray:
  """Returns [B, T] bool: words after the second medium of their document."""
  places, segments = np.asarray(batch.placeholders) >= 0, np.asarray(batch.segments)
  seen = np.zeros(places.shape, int)
  for row, column in np.argwhere(segments > 0):
    same = column > 0 and segments[row, column - 1] == segments[row, column]
    seen[row, column] = (seen[row, column - 1] if same else 0) + places[row, column]
  return (seen == 2) & ~places


def measure(folder: pathlib.Path, given: argparse.Namespace) -> Iterator[Row]:
  """Yields figures of a run, by order of the media and by case."""
  del given
  model = lab.from_pretrained(folder)
  decoder, variables = model.decoder, model.variables
  splits = model.experiment.data.prepare(CACHE_DIR).by_source

  def forward(variables: Any, batch: Batch) -> Any:
    _, chosen = target_scores(decoder, variables, batch)
    _, seen = decoder.apply(variables, context_of(batch), mutable=['observed'])
    return chosen, [
      value['weights']
      for path, value in jax.tree_util.tree_leaves_with_path(
        seen['observed'], is_leaf=lambda node: isinstance(node, dict) and 'weights' in node
      )
      if 'fusion' in jax.tree_util.keystr(path)
    ]

  run = jax.jit(forward)
  for split, (other, own) in zip(splits, ORDERS):
    batches = list(heldout_batches(split, split.config.batch_size))
    for case in CASES:
      rng = np.random.default_rng(0)
      nats = tokens = words = 0.0
      weights: Any = 0.0
      for batch in batches:
        chosen, found = run(variables, altered(batch, case, other, own, rng))
        part = second_part(batch)
        learnt = np.asarray(batch.weights) * part
        nats -= float((np.asarray(chosen) * learnt).sum())
        tokens += float(learnt.sum())
        # Before the second medium the words see the first alone: its kind has no weight there.
        words += float(part.sum())
        weights = weights + np.array([np.asarray(layer)[MEDIA[own]] for layer in found])
      row: Row = {'about': own, 'case': case, 'nats': nats / tokens}
      if np.size(weights):
        row['weight'] = (weights / words).tolist()
      yield row


def show(rows: list[Row], folder: pathlib.Path) -> str:
  """Returns a Markdown table: means over the seeds."""
  del folder
  variants = list(dict.fromkeys(row['variant'] for row in rows))
  lines = [
    '| second caption about | shown | '
    + ' | '.join(f'{name}: nats a token' for name in variants)
    + ' | weight of the own medium, by layer |',
    '|---|---|' + '---:|' * (len(variants) + 1),
  ]
  for about in dict.fromkeys(row['about'] for row in rows):
    for case in CASES:
      own = [row for row in rows if (row['about'], row['case']) == (about, case)]
      cells = []
      for name in variants:
        values = [row['nats'] for row in own if row['variant'] == name]
        cells.append(f'{np.mean(values):.3f} ({", ".join(f"{x:.3f}" for x in values)})')
      weights = [row['weight'] for row in own if 'weight' in row]
      means = ', '.join(f'{x:.2f}' for x in np.mean(weights, axis=0)) if weights else '—'
      lines.append(f'| {about} | {case} | {" | ".join(cells)} | {means} |')
  return '\n'.join(lines)


if __name__ == '__main__':
  reading.main(argparse.ArgumentParser(description=__doc__), measure, show)
