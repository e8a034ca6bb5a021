"""Which curves a run has, and how each is drawn."""

from typing import Any

import numpy as np

from deepseek_jax.train.history import (
  History,
  column,
  layer_column,
  loss_key,
  shown_range,
  smooth,
)
from deepseek_jax.train.page.chart import Chart, Line

# Title, key, unit, factor, scale of the y axis.
_KNOWN: tuple[tuple[str, str, str, float, Any], ...] = (
  ('Learning rate', 'learning_rate', '', 1.0, 'linear'),
  ('Gradient norm', 'grad_norm', 'before clipping', 1.0, 'log'),
  ('Speed', 'tokens_per_second', 'tokens per second', 1.0, 'linear'),
  ('MFU', 'mfu', 'per cent of the matmul peak', 100.0, 'linear'),
  ('Peak memory', 'peak_memory_bytes', 'GiB', 2.0**-30, 'linear'),
  ('Loss of multi-token prediction', 'mtp_loss', 'nats per token', 1.0, 'linear'),
  ('Auxiliary loss', 'auxiliary_loss', '', 1.0, 'log'),
)
_ELSEWHERE = {'step', 'loss', 'bits_per_byte', 'seconds_left', 'elapsed_seconds', 'host_seconds'}
_CONSTANT = {'tokens'}
LOSS_TITLES = {'bits_per_byte': ('Bits per byte', ''), 'loss': ('Loss', 'nats per token')}
_NOISY = {'grad_norm', 'tokens_per_second', 'mfu', 'mtp_loss', 'auxiliary_loss'}


def loss_chart(history: History) -> Chart:
  """Training and held-out loss beside the yardsticks.

  Args:
    history: a run with at least one logged row.
  """
  rows = history.rows
  key = loss_key(rows)
  title, unit = LOSS_TITLES[key]
  steps, values = column(rows, 'step'), column(rows, key)
  smoothed = smoothed_loss(values)
  held_out = column(history.evaluations, key)
  levels = dict(history.yardsticks) if key == 'bits_per_byte' else {}
  missing = int(np.count_nonzero(~np.isfinite(values)))
  note = f'{missing:,} of {len(values):,} logged steps have no finite loss.' if missing else ''
  window = smoothing_window(len(values))
  label = 'training' if window == 1 else f'training, mean of {window} logged steps'
  return Chart(
    title=title,
    unit=unit,
    size='wide',
    lines=(
      Line(label='as logged' if window > 1 else '', x=steps, y=values, kind='faint'),
      Line(label=label, x=steps, y=smoothed),
      Line(
        label='held out',
        x=column(history.evaluations, 'step'),
        y=held_out,
        kind='points',
        colour=1,
      ),
    ),
    levels=levels,
    y_range=shown_range([smoothed, held_out], list(levels.values())),
    note=note,
  )


def smoothing_window(rows: int) -> int:
  """How many neighbours of a curve with so many rows are averaged."""
  return rows // 50 | 1  # odd, so that the mean lies over its own step


def smoothed_loss(values: np.ndarray) -> np.ndarray:
  """A curve without its noise.

  Args:
    values: float64 [n].

  Returns:
    float64 [n], NaN where there was no number: a gap is not bridged.
  """
  smoothed = smooth(values, smoothing_window(len(values)))
  return np.where(np.isfinite(values), smoothed, np.nan)


def other_charts(history: History) -> list[Chart]:
  """Every other scalar that was logged, the usual ones first."""
  rows = history.rows
  known = [entry for entry in _KNOWN if np.isfinite(column(rows, entry[1])).any()]
  charts = [
    _scalar_chart(history, key, title, unit, factor, scale)
    for title, key, unit, factor, scale in known
  ]
  named = _ELSEWHERE | _CONSTANT | {entry[1] for entry in _KNOWN}
  for key in dict.fromkeys(key for row in rows for key in row):
    if key not in named and np.isfinite(column(rows, key)).any():
      charts.append(
        _scalar_chart(history, key, key.replace('_', ' ').capitalize(), '', 1.0, 'linear')
      )
  return charts


def _scalar_chart(
  history: History, key: str, title: str, unit: str, factor: float, scale: Any
) -> Chart:
  steps, values = column(history.rows, 'step'), factor * column(history.rows, key)
  lines = [Line(label=title, x=steps, y=values)]
  if key in _NOISY and smoothing_window(len(values)) > 1:
    lines = [
      Line(label='', x=steps, y=values, kind='faint'),
      Line(label=title, x=steps, y=smoothed_loss(values)),
    ]
  return Chart(title=title, unit=unit, lines=lines, scale=scale)


def expert_charts(history: History) -> list[Chart]:
  """How even the experts' loads are: worst layer and mean of the layers."""
  rows = history.rows
  steps = column(rows, 'step')
  charts = []
  for title, key, unit, factor, worst in (
    ('Max violation', 'max_violation', 'busiest over equal share, less 1', 1.0, np.max),
    ('Dead experts', 'dead_fraction', 'per cent of a layer', 100.0, np.max),
    ('Entropy of the load', 'load_entropy', '1 is even', 1.0, np.min),
    ('Dropped choices', 'drop_rate', 'per cent of the choices', 100.0, np.max),
    ('Norm of the selection bias', 'bias_norm', '', 1.0, np.max),
  ):
    values = factor * layer_column(rows, key, worst)
    if not np.isfinite(values).any():
      continue
    extreme = 'lowest layer' if worst is np.min else 'highest layer'
    mean = factor * layer_column(rows, key, np.mean)
    lines = (
      Line(label=extreme, x=steps, y=values, colour=1),
      Line(label='mean of the layers', x=steps, y=mean),
    )
    charts.append(Chart(title=title, unit=unit, lines=lines))
  return charts
