"""Which experts of each router read which kinds of tokens.

  python -m experiments.router_kinds.maps --sweep=runs/router_kinds [--tokens=20000] [--out=FOLDER]
  python -m experiments.router_kinds.maps --maps=FILE [--out=FOLDER]

Reads the last layer of the first seed of every variant on held-out text. Writes maps.json, draws
maps.svg and maps.png, and prints how much an expert tells of the kind of a token; with --maps, from
numbers of earlier.
"""

import argparse
import itertools
import json
import pathlib
from typing import Any

import jax
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from deepseek_jax import lab
from deepseek_jax.data.packed_split import heldout_batches
from deepseek_jax.hub import CACHE_DIR
from deepseek_jax.train.history import LOAD_COLOURS

HERE = pathlib.Path(__file__).parent


def read(sweep: pathlib.Path, tokens: int) -> dict[str, Any]:
  """Counts, for every variant of a sweep, choices of each expert by tokens of each kind."""
  found = {}
  for folder in sorted(sweep.glob('*/seed_0')):
    model = lab.from_pretrained(folder)
    data = model.experiment.data
    split = data.prepare(CACHE_DIR.expanduser()).heldout
    batches = itertools.islice(
      heldout_batches(split, data.batch_size), -(-tokens // (data.batch_size * data.length))
    )
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    load = lab.expert_load(model, joined)
    # In the order of the alphabet: every router's rows are the same.
    order = [load.classes.index(name) for name in sorted(load.classes)]
    found[folder.parent.name] = {
      'classes': sorted(load.classes),
      'layer': load.layers[-1],
      'counts': load.counts[-1][order].tolist(),
    }
    print(f'read {folder}', flush=True)
  return found


def information(counts: np.ndarray) -> float:
  """Mutual information of kind and expert in bits, from counts [kinds, E].

  What chance alone would show, (kinds − 1)(E − 1) / (2 N ln 2), is taken off.

  Source: Miller, Note on the bias of information estimates, 1955.
  """
  total = counts.sum()
  joint = counts / total
  even = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
  some = joint > 0
  used = (counts.sum(axis=0) > 0).sum()
  chance = (len(counts) - 1) * (used - 1) / (2 * total * np.log(2))
  return float(np.sum(joint[some] * np.log2(joint[some] / even[some])) - chance)


def draw(found: dict[str, Any], folder: pathlib.Path) -> None:
  """Draws a table a router: rows are kinds of tokens, columns experts, the busiest first."""
  colours = LinearSegmentedColormap.from_list('load', LOAD_COLOURS)
  columns = 3
  rows = -(-len(found) // columns)
  figure = Figure(figsize=(10, 2.3 * rows + 0.4), layout='constrained')
  grid = figure.subplots(rows, columns, squeeze=False)
  image = None
  for axes in list(grid.flat)[len(found) :]:
    axes.axis('off')
  for axes, (name, entry) in zip(grid.flat, found.items()):
    counts = np.array(entry['counts'])
    counts = counts[:, np.argsort(-counts.sum(axis=0), kind='stable')]
    shares = counts / counts.sum(axis=1, keepdims=True)
    image = axes.imshow(shares * shares.shape[1], cmap=colours, vmin=0, vmax=2, aspect='auto')
    axes.set_title(f'{name}  {information(counts):.2f} bits', loc='left', fontsize=9)
    axes.set_yticks(range(len(entry['classes'])), entry['classes'], fontsize=7)
    axes.set_xticks([])
  for axes in grid[:, 1:].flat:
    axes.set_yticks([])
  figure.supxlabel('experts of the last layer, the busiest first', fontsize=9)
  figure.colorbar(image, ax=list(grid.flat), label='times the even share', extend='max')
  figure.savefig(folder / 'maps.svg', metadata={'Date': None})
  figure.savefig(folder / 'maps.png', dpi=120)


def main() -> None:
  """Reads counts, or a file of them; draws and prints."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--sweep', type=pathlib.Path, default=pathlib.Path('runs/router_kinds'))
  parser.add_argument('--maps', type=pathlib.Path)
  parser.add_argument('--tokens', type=int, default=20_000)
  parser.add_argument('--out', type=pathlib.Path, default=HERE)
  arguments = parser.parse_args()
  if arguments.maps is None:
    found = read(arguments.sweep, arguments.tokens)
    text = json.dumps(found, indent=1)
    (arguments.out / 'maps.json').write_text(text, encoding='utf-8')
  else:
    found = json.loads(arguments.maps.read_text(encoding='utf-8'))
  draw(found, arguments.out)
  print('| router | bits of a kind that an expert tells |\n|---|---:|')
  for name, entry in found.items():
    print(f'| {name} | {information(np.array(entry["counts"])):.3f} |')


if __name__ == '__main__':
  main()
