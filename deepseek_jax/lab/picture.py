"""Figures that show themselves in a notebook, and curves of several trials in one of them."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from deepseek_jax.core.config import ConfigError, did_you_mean
from deepseek_jax.lab.trial import Trial, standard_error

# The palette of Okabe and Ito, which readers with any colour vision can tell apart.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#222222')
MOST_LABELS = 64


class Picture(Figure):
  """A matplotlib figure that no global state knows of; `savefig` writes it to a file."""

  def _repr_png_(self) -> bytes:
    """What a notebook shows."""
    buffer = io.BytesIO()
    self.savefig(buffer, format='png', dpi=110)
    return buffer.getvalue()


def plot_curves(trials: Mapping[str, Trial], metric: str = 'loss', smooth: int = 5) -> Picture:
  """Draws a curve of every trial: mean over the seeds, and a band of one standard error.

  Args:
    trials: name → trial.
    metric: a name in `Trial.curves`.
    smooth: steps of the running mean that is drawn; 1 draws every step.

  Raises:
    ConfigError: there is no trial, or one has no such curve.
  """
  if not trials:
    raise ConfigError('plot_curves: expected at least 1 trial, found none')
  if smooth < 1:
    raise ConfigError(f'smooth: found {smooth}, expected at least 1 step')
  picture = Picture(figsize=(6.4, 3.8), layout='constrained')
  axes = picture.subplots()
  for number, (name, trial) in enumerate(trials.items()):
    if metric not in trial.curves:
      known = ', '.join(trial.curves)
      near = did_you_mean(metric, trial.curves)
      raise ConfigError(f'{name}: has no curve `{metric}`{near}; it has {known}')
    colour = COLOURS[number % len(COLOURS)]
    values = np.stack([running_mean(row, smooth) for row in trial.curves[metric]])
    steps = np.arange(1, values.shape[1] + 1)
    mean, error = values.mean(axis=0), standard_error(values)
    runs = f'{len(values)} seeds' if len(values) > 1 else '1 seed'
    axes.plot(steps, mean, color=colour, label=f'{name} ({runs})')
    if len(values) > 1:
      axes.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
  axes.set_xlabel('step')
  unit = ', nats a token' if metric.endswith('loss') else ''
  over = f' (mean of {smooth} steps)' if smooth > 1 else ''
  axes.set_ylabel(f'{metric}{unit}{over}')
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False)
  return picture


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
  """Returns the mean of each value and those before it, up to `window` of them, [N]."""
  sums = np.cumsum(np.concatenate([[0.0], values]))
  ends = np.arange(1, len(values) + 1)
  starts = np.maximum(ends - window, 0)
  return (sums[ends] - sums[starts]) / (ends - starts)


def legible(piece: str) -> str:
  """Returns a token's text with white space that can be seen, and no mathematics in it."""
  return piece.replace('\n', '⏎').replace(' ', '·').replace('$', r'\$')


def label_pieces(axis: Any, pieces: Sequence[str], rotation: float = 0.0) -> None:
  """Writes tokens along an axis, at most 64 of them: of more, every other, third, …"""
  every = -(-len(pieces) // MOST_LABELS)
  ticks = range(0, len(pieces), every)
  axis.set_ticks(ticks, [legible(pieces[i]) for i in ticks], fontsize=7, rotation=rotation)
