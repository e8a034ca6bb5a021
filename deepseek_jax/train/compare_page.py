"""Runs beside each other: what their configs differ in, and what came of it."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.describe import duration, table
from deepseek_jax.core.difference import difference
from deepseek_jax.train.history import (
  History,
  column,
  layer_column,
  loss_key,
  read_history,
  recent,
  shown_range,
  wall_clock,
)
from deepseek_jax.train.page import markup
from deepseek_jax.train.page.chart import Chart, Line, draw
from deepseek_jax.train.page.curves import LOSS_TITLES, smoothed_loss
from deepseek_jax.train.report_page import spell, status

MOST_RUNS = 6
_ABSENT = '—'


class Runs:
  """Some runs with names that tell them apart; the first is what the others are measured against.

  Attributes:
    names: of the runs.
    histories: the runs.
    key: the number that says how good a run is, the same for all.
  """

  def __init__(self, histories: Sequence[History]):
    """Names each run after its folder, with as much of the path as it takes to tell them apart.

    Args:
      histories: two to six runs.
    """
    self.histories = tuple(histories)
    parts = [history.path.resolve().parts for history in histories]
    depth = 1
    longest = max(map(len, parts))
    while len({part[-depth:] for part in parts}) < len(parts) and depth < longest:
      depth += 1
    self.names = tuple('/'.join(part[-depth:]) for part in parts)
    # Bits per byte only where all have it: nats of two tokenizers cannot be compared, and are said.
    keys = {loss_key(history.rows) for history in histories if history.rows}
    self.key = 'bits_per_byte' if keys == {'bits_per_byte'} else 'loss'


def read_runs(paths: Sequence[pathlib.Path]) -> Runs:
  """Reads the folders of some runs.

  Args:
    paths: of the runs, two to six.

  Raises:
    ConfigError: too many, one named twice, or a folder without a run.
  """
  if len(paths) > MOST_RUNS:
    raise ConfigError(f'found {len(paths)} runs, expected {MOST_RUNS} at most')
  if len({path.resolve() for path in paths}) < len(paths):
    raise ConfigError('a run is named twice')
  return Runs([read_history(path) for path in paths])


def config_rows(runs: Runs) -> list[tuple[str, ...]]:
  """Every field in which a run differs from the first: its path, and its value in each run.

  Args:
    runs: the runs; one without a readable config differs in nothing.
  """
  configs = [history.experiment for history in runs.histories]
  if configs[0] is None:
    return []
  paths: dict[str, None] = {}
  for config in configs[1:]:
    if config is not None:
      paths |= dict.fromkeys(change.path for change in difference(configs[0], config))
  return [(path, *(_value(config, path) for config in configs)) for path in paths]


def _value(config: Any, path: str) -> str:
  """A field's value as Python; a dash where the run has no such field."""
  if config is None:
    return _ABSENT
  for name in path.split('.'):
    if isinstance(config, tuple):
      if int(name) >= len(config):
        return _ABSENT
      config = config[int(name)]
    elif hasattr(config, name):
      config = getattr(config, name)
    else:
      return _ABSENT
  return spell(config)


def _last(history: History, key: str) -> float:
  values = column(history.evaluations, key)
  known = values[np.isfinite(values)]
  return float(known[-1]) if known.size else np.nan


def _measures(key: str) -> list[tuple[str, Callable[[History], float], Callable[[float], str]]]:
  four = lambda x: f'{x:.4f}'  # noqa: E731
  unit = ' '.join(filter(None, LOSS_TITLES[key])).lower()
  median = lambda name: lambda h: _median(column(h.rows, name))  # noqa: E731
  return [
    (f'held out, {unit}', lambda h: _last(h, key), four),
    (f'training, {unit}', lambda h: recent(column(h.rows, key)), four),
    ('steps', lambda h: float(h.step), lambda x: f'{x:,.0f}'),
    ('time', lambda h: _most(wall_clock(h.rows)), duration),
    ('tokens per second', median('tokens_per_second'), lambda x: f'{x:,.0f}'),
    ('MFU', median('mfu'), lambda x: f'{x:.1%}'),
    ('peak memory, GiB', lambda h: _most(column(h.rows, 'peak_memory_bytes')) / 2**30, four),
    ('max violation', lambda h: recent(layer_column(h.rows, 'max_violation')), four),
    ('faults', lambda h: float(len(h.faults)), lambda x: f'{x:.0f}'),
  ]


def _median(values: np.ndarray) -> float:
  known = values[np.isfinite(values)]
  return float(np.median(known)) if known.size else np.nan


def _most(values: np.ndarray) -> float:
  known = values[np.isfinite(values)]
  return float(known.max()) if known.size else np.nan


def figure_rows(runs: Runs) -> list[tuple[str, ...]]:
  """The last figures: what, and each run's, with the difference from the first run's.

  Args:
    runs: the runs.
  """
  found = []
  for name, measure, write in _measures(runs.key):
    values = [measure(history) for history in runs.histories]
    if not np.isfinite(values).any():
      continue
    cells = []
    for at, value in enumerate(values):
      text = write(value) if np.isfinite(value) else _ABSENT
      if at and np.isfinite(value) and np.isfinite(values[0]):
        text += _change(values[0], value)
      cells.append(text)
    found.append((name, *cells))
  return found


def _change(first: float, value: float) -> str:
  if value == first:
    return ' (=)'
  return f' ({value / first - 1:+.2%})' if first else f' ({value - first:+.4g})'


def compare_text(runs: Runs) -> str:
  """Returns the comparison for a terminal."""
  parts = [f'{name}: {status(h)}' for name, h in zip(runs.names, runs.histories)]
  problems = [text for history in runs.histories for text in history.problems]
  parts += [f'could not be read: {text}' for text in problems]
  rows = [tuple(_one_line(cell) for cell in row) for row in config_rows(runs)]
  parts.append('')
  parts.append(table(rows, ('config', *runs.names)) if rows else 'the configs are equal')
  parts += ['', table(figure_rows(runs), ('last figures', *runs.names))]
  return '\n'.join(parts)


def _one_line(text: str) -> str:
  line = ' '.join(text.split())
  return line if len(line) <= 60 else f'{line[:59]}…'


def compare_page(runs: Runs) -> str:
  """Returns the comparison as one self-contained page."""
  lead = [markup.paragraph(f'{n}: {status(h)}') for n, h in zip(runs.names, runs.histories)]
  lead += [
    markup.paragraph(f'Could not be read: {text}', 'warn')
    for history in runs.histories
    for text in history.problems
  ]
  headers = ('what', *runs.names)
  figures = markup.table(headers, figure_rows(runs), numeric=len(runs.names))
  note = (
    'Percentages are against the first run. Training figures are the mean of the last twentieth '
    'of the logged steps, speeds are medians.'
  )
  rows = config_rows(runs)
  config = (
    markup.table(('field', *runs.names), rows) if rows else markup.paragraph('They are equal.')
  )
  curves = f'<div class="charts">{"".join(map(draw, _charts(runs)))}</div>'
  parts = (
    ('config', 'Difference of the configs', config),
    ('figures', 'Last figures', figures + markup.paragraph(note, 'note')),
    ('curves', 'Curves', curves),
  )
  sections = [(name, title, markup.section(name, title, body)) for name, title, body in parts]
  return markup.document(' / '.join(runs.names), '\n'.join(lead), sections)


def _hours(history: History) -> np.ndarray:
  return wall_clock(history.rows) / 3600


def _steps(history: History) -> np.ndarray:
  return column(history.rows, 'step')


def _charts(runs: Runs) -> list[Chart]:
  title, unit = LOSS_TITLES[runs.key]
  smoothed = [smoothed_loss(column(history.rows, runs.key)) for history in runs.histories]
  held_out = [column(history.evaluations, runs.key) for history in runs.histories]
  ranges = [shown_range([a, b], ()) for a, b in zip(smoothed, held_out) if np.isfinite(a).any()]
  y_range = (min(r[0] for r in ranges), max(r[1] for r in ranges)) if ranges else None

  def overlay(x_unit: str, at: Callable[[History], np.ndarray]) -> Chart:
    lines = [
      Line(label=name, x=at(history), y=values, colour=number)
      for number, (name, history, values) in enumerate(zip(runs.names, runs.histories, smoothed))
    ]
    return Chart(
      title=f'{title} in training, smoothed',
      unit=unit,
      x_unit=x_unit,
      lines=lines,
      size='wide',
      y_range=y_range,
    )

  points = [
    Line(label=name, x=column(h.evaluations, 'step'), y=values, kind='points', colour=number)
    for number, (name, h, values) in enumerate(zip(runs.names, runs.histories, held_out))
  ]
  charts = [overlay('step', _steps), overlay('hours of training', _hours)]
  charts.append(Chart(title=f'{title}, held out', unit=unit, lines=points, size='wide'))
  return charts + _small_charts(runs)


def _small_charts(runs: Runs) -> list[Chart]:
  charts = []
  measures: tuple[tuple[str, Callable[[History], np.ndarray], str, Any], ...] = (
    ('Speed', lambda h: column(h.rows, 'tokens_per_second'), 'tokens per second', 'linear'),
    ('Gradient norm', lambda h: column(h.rows, 'grad_norm'), 'before clipping', 'log'),
    ('Learning rate', lambda h: column(h.rows, 'learning_rate'), '', 'linear'),
    ('Max violation', lambda h: layer_column(h.rows, 'max_violation'), 'highest layer', 'linear'),
    ('Dead experts', lambda h: 100 * layer_column(h.rows, 'dead_fraction'), 'per cent', 'linear'),
  )
  for title, measure, unit, scale in measures:
    lines = [
      Line(label=name, x=_steps(history), y=smoothed_loss(measure(history)), colour=number)
      for number, (name, history) in enumerate(zip(runs.names, runs.histories))
    ]
    if any(np.isfinite(line.y).any() for line in lines):
      charts.append(Chart(title=title, unit=unit, lines=lines, scale=scale))
  return charts
