"""Which kinds of parallelism go together: each set of them takes the step of one device.

`docs/composition.md` is the table of these tests. A few cells are run every time, all of them where
slow tests are, and each must say what the page says. To write the page anew:

  python -m tests.parity.test_composition
"""

import dataclasses
import itertools
import math
import pathlib
from typing import Any

import jax
import pytest

from configs import tiny_dsa, tiny_mhc, tiny_mla, tiny_v4
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.models.pipeline import GPipe
from deepseek_jax.optim.compression import Exact
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import Constant
from deepseek_jax.sharding.mesh import MESH_AXES, MeshConfig
from deepseek_jax.sharding.presets import POD
from deepseek_jax.train.experiment import Experiment
from tests.parity.test_pipeline import LENGTH, ROWS, assert_same_steps

PAGE = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'composition.md'
AXES: dict[str, tuple[str, dict[str, Any]]] = {
  'replica': ('sums of replicas', {'reduction': Exact()}),
  'stage': ('pipeline', {'pipeline': GPipe(microbatches=2)}),
  'data': ('sharded weights', {}),
  'seq': ('context', {}),
  'expert': ('experts', {'model.feed_forward.dispatch': AllToAll()}),
  'model': ('tensor', {}),
}
"""What each axis of the mesh is for, and what a run needs for it beside a mesh of that size."""
MODELS = {
  'V3': (tiny_mla, {'model.depth': 3}),
  'V3.2': (tiny_dsa, {'model.depth': 3}),
  'V4': (tiny_v4, {'model.depth': 6}),
  'lanes': (tiny_mhc, {'model.depth': 3}),
}
TRIPLES = (
  ('replica', 'data', 'expert'),
  ('replica', 'stage', 'expert'),
  ('replica', 'seq', 'model'),
  ('stage', 'data', 'expert'),
  ('stage', 'seq', 'expert'),
  ('stage', 'data', 'model'),
  ('data', 'seq', 'expert'),
  ('data', 'expert', 'model'),
  ('seq', 'expert', 'model'),
)
SETS = tuple((axis,) for axis in MESH_AXES) + tuple(itertools.combinations(MESH_AXES, 2)) + TRIPLES
CELLS = [(model, axes) for axes in SETS for model in MODELS]
ALWAYS = (('V3', ('stage', 'seq', 'expert')),)
"""Cells that are run every time."""
SAME = 'same'


def experiment(model: str, axes: tuple[str, ...]) -> Experiment:
  """A tiny run with two devices along each of some axes; none is one device."""
  config, changes = MODELS[model]
  base = config.get_config()
  chosen = {
    'data.length': LENGTH,
    'data.batch_size': ROWS,
    'optimizer': AdamW(peak_lr=1e-2, epsilon=1e-2),
    'schedule': Constant(),
    'rules': POD,
    'mesh': MeshConfig(**{axis: 2 if axis in axes else 1 for axis in MESH_AXES}),
  }
  for axis in axes:
    chosen |= AXES[axis][1]
  return override(base, changes | chosen)[0]


def found(model: str, axes: tuple[str, ...]) -> str:
  """Returns `SAME`, or the sentence with which the combination is refused.

  Raises:
    AssertionError: it runs, and computes something else.
  """
  chosen = experiment(model, axes)
  devices = math.prod(dataclasses.asdict(chosen.mesh).values())
  errors = chosen.check(devices)
  if errors:
    return '; '.join(errors)
  try:
    assert_same_steps(chosen, experiment(model, ()))
  except ConfigError as error:
    return '; '.join(error.messages)
  return SAME


def page(cells: dict[tuple[str, tuple[str, ...]], str]) -> str:
  """Returns the page, given what was found for every cell."""
  refusals = list(dict.fromkeys(text for text in cells.values() if text != SAME))
  lines = [
    '# What goes together',
    '',
    'A training step on up to eight host devices, two along each axis that is named, is compared',
    'with that of one device: loss, gradient of every weight (relative 1e-5 of its largest entry,',
    'or of a thousandth of the largest of all; for gates and base of hyper-connections, which sum',
    'over everything, 2e-4, or 1e-5 of a fiftieth of the largest of all), moments, updated',
    'weights, loads of experts and selection biases, on rows of packed documents of very unequal',
    'length, in float32. *Same* is equal; a number is the sentence with which the combination is',
    'refused before anything is compiled. Every model has experts with a selection bias: V3 latent',
    'attention, V3.2 its sparse form, V4 windows, CSA, HCA, hash routing and hyper-connections,',
    '*lanes* hyper-connections around latent attention;',
    'and a module of multi-token prediction where its config has one.',
    '',
    'Made by `python -m tests.parity.test_composition`, which runs what the tests of the same file',
    'run.',
    '',
    '| axes of the mesh | for | ' + ' | '.join(MODELS) + ' |',
    '|---' * (2 + len(MODELS)) + '|',
  ]
  for axes in SETS:
    row = [' × '.join(f'`{axis}`' for axis in axes), ', '.join(AXES[axis][0] for axis in axes)]
    row += [
      text if (text := cells[model, axes]) == SAME else f'[{refusals.index(text) + 1}]'
      for model in MODELS
    ]
    lines.append('| ' + ' | '.join(row) + ' |')
  lines += ['', *(f'{number}. {text}' for number, text in enumerate(refusals, start=1))]
  return '\n'.join(lines).rstrip() + '\n'


def said() -> dict[tuple[str, tuple[str, ...]], str]:
  """Returns what the page says of every cell."""
  lines = PAGE.read_text(encoding='utf-8').splitlines()
  sentences = dict(line.split('. ', 1) for line in lines if line[:1].isdigit())
  cells = {}
  for line in lines:
    if line.startswith('| `'):
      first, _, *texts = (part.strip() for part in line.strip('|').split('|'))
      axes = tuple(axis.strip('` ') for axis in first.split('×'))
      for model, text in zip(MODELS, texts, strict=True):
        cells[model, axes] = text if text == SAME else sentences[text.strip('[]')]
  return cells


@pytest.mark.parametrize(
  ('model', 'axes'),
  [
    pytest.param(
      model,
      axes,
      id=f'{model}-{"-".join(axes)}',
      marks=[] if (model, axes) in ALWAYS else [pytest.mark.slow],
    )
    for model, axes in CELLS
  ],
)
def test_cell(model, axes):
  """What is found is what the page says."""
  assert found(model, axes) == said()[model, axes]


def test_the_page_is_whole():
  """Every cell is in it, in the form in which it is written."""
  cells = said()
  assert set(cells) == set(CELLS)
  assert PAGE.read_text(encoding='utf-8') == page(cells)


def main() -> None:
  """Runs every cell and writes the page."""
  import tests.conftest  # noqa: F401  (asks for eight devices)

  cells = {}
  for number, (model, axes) in enumerate(CELLS, start=1):
    try:
      cells[model, axes] = found(model, axes)
    except AssertionError as error:
      cells[model, axes] = f'DIFFERS: {error}'.splitlines()[0]
    print(f'{number}/{len(CELLS)} {model} {" ".join(axes)}: {cells[model, axes]}', flush=True)
    jax.clear_caches()
  PAGE.write_text(page(cells), encoding='utf-8')


if __name__ == '__main__':
  main()
