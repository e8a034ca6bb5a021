"""Draws a run: its loss against held-out text and yardsticks, and how busy its experts were.

  python scripts/plot_run.py --workdir=runs/first

Reads `metrics.jsonl`, `evaluations.jsonl` and `yardsticks.json` (the last two may be absent) from
the workdir; writes `run.png` and `run.svg` there, or where --out says.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from absl import app, flags
from matplotlib.colors import LinearSegmentedColormap

from deepseek_jax.core.config import ConfigError
from deepseek_jax.train.history import (
  LOAD_COLOURS,
  Rows,
  column,
  load_table,
  loss_key,
  read_history,
  shown_range,
)
from deepseek_jax.train.page.curves import smoothed_loss

_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory of the run.', required=True)
_OUT = flags.DEFINE_string('out', None, 'Picture without its ending; default: <workdir>/run.')
_TITLE = flags.DEFINE_string('title', None, 'Title; default: the name of the workdir.')

# From the palette of Okabe and Ito, which readers with any colour vision can tell apart.
_BLUE, _ORANGE, _INK, _GREY = '#0072B2', '#D55E00', '#222222', '#6b6b6b'
_STYLE: dict[Any, Any] = {
  'font.family': 'DejaVu Sans',
  'font.size': 9.5,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.edgecolor': _GREY,
  'axes.labelcolor': _INK,
  'xtick.color': _GREY,
  'ytick.color': _GREY,
  'svg.fonttype': 'none',
  'svg.hashsalt': 'deepseek_jax',
}
_MOST_COLUMNS = 240


def draw_curve(axes: Any, rows: Rows, held_out: Rows, yardsticks: Mapping[str, float]) -> None:
  """Draws bits per byte, or the loss where bits per byte were not measured.

  Args:
    axes: where to draw.
    rows: the rows of `metrics.jsonl`.
    held_out: the rows of `evaluations.jsonl`.
    yardsticks: name → bits per byte of another compressor of the held-out text.
  """
  key = loss_key(rows)
  steps, values = column(rows, 'step'), column(rows, key)
  smoothed = smoothed_loss(values)
  axes.plot(steps, values, color=_BLUE, alpha=0.22, linewidth=0.8)
  axes.plot(steps, smoothed, color=_BLUE, linewidth=1.8, label='training')
  points = column(held_out, key)
  if np.isfinite(points).any():
    axes.plot(
      column(held_out, 'step'),
      points,
      color=_ORANGE,
      linewidth=1.1,
      marker='o',
      markersize=4.5,
      markeredgecolor='white',
      markeredgewidth=0.7,
      label='held out',
    )
    last = points[np.isfinite(points)][-1]
    axes.annotate(
      f'{last:.2f}',
      (column(held_out, 'step')[np.isfinite(points)][-1], last),
      xytext=(0, -13),
      textcoords='offset points',
      ha='center',
      color=_ORANGE,
      fontweight='bold',
      bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.6},
    )
  lines = {name: value for name, value in yardsticks.items() if key == 'bits_per_byte'}
  low, high = shown_range([smoothed, points], list(lines.values()))
  # Room for the last held-out number, which stands under its point.
  axes.set_ylim(low - 0.05 * (high - low), high)
  axes.set_xlim(0, steps.max() * 1.005)
  _draw_yardsticks(axes, lines)
  axes.set_xlabel('step')
  axes.set_ylabel('bits per byte' if key == 'bits_per_byte' else 'loss (nats per token)')
  axes.legend(loc='upper right', facecolor='white', edgecolor='none', framealpha=1.0)


def _draw_yardsticks(axes: Any, lines: Mapping[str, float]) -> None:
  """Dashed lines whose names stand right of the plot, apart from each other."""
  low, high = axes.get_ylim()
  apart = 0.062 * (high - low)
  at = -math.inf
  for name, value in sorted(lines.items(), key=lambda item: item[1]):
    axes.axhline(value, color=_GREY, linewidth=0.9, linestyle=(0, (5, 3)), zorder=0)
    at = max(value, at + apart)
    axes.annotate(
      f'{name}  {value:.2f}',
      xy=(1.0, value),
      xytext=(1.025, at),
      xycoords=('axes fraction', 'data'),
      textcoords=('axes fraction', 'data'),
      va='center',
      color=_INK,
      fontsize=8.5,
      arrowprops={'arrowstyle': '-', 'color': _GREY, 'linewidth': 0.7, 'shrinkA': 1, 'shrinkB': 0},
    )


def draw_loads(axes: Any, rows: Rows) -> None:
  """Draws a band for each layer, a line for each expert: how busy it was at each step.

  Args:
    axes: where to draw.
    rows: the rows of `metrics.jsonl`, some with a `load`.
  """
  layers, steps, table = load_table(rows)
  chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MOST_COLUMNS)).round())
  chosen = chosen.astype(np.int64)
  experts = table.shape[1]
  gap = max(1, round(experts / 8))
  bands: list[np.ndarray] = []
  centres = []
  for index in range(len(layers)):
    centres.append(len(bands) * (experts + gap) / 2 + experts / 2)
    bands += [table[index][:, chosen], np.full((gap, len(chosen)), math.nan)]
  picture = np.concatenate(bands[:-1])
  edges = np.append(steps[chosen], steps[chosen][-1] + max(1, np.diff(steps[chosen][-2:]).sum()))
  mesh = axes.pcolormesh(
    edges,
    np.arange(len(picture) + 1),
    np.ma.masked_invalid(picture),
    cmap=LinearSegmentedColormap.from_list('load', LOAD_COLOURS),
    vmin=0,
    vmax=2,
    rasterized=True,
  )
  axes.invert_yaxis()
  shown = range(0, len(layers), math.ceil(len(layers) / 14))
  axes.set_yticks(
    [centres[i] for i in shown], [layers[i].removeprefix('layers/').split('/')[0] for i in shown]
  )
  axes.tick_params(axis='y', length=0)
  for side in axes.spines.values():
    side.set_visible(False)
  axes.set_xlim(0, max(row['step'] for row in rows) * 1.005)
  axes.set_xlabel('step')
  axes.set_ylabel(f'layer ({experts} experts each)')
  bar = axes.figure.colorbar(mesh, cax=axes.inset_axes((1.025, 0, 0.016, 1)), ticks=[0, 1, 2])
  bar.ax.set_yticklabels(['0  dead', '1  equal share', '≥ 2  busy'])
  bar.ax.tick_params(length=0, labelsize=8.5)
  bar.outline.set_visible(False)


def draw_run(workdir: pathlib.Path, title: str) -> Any:
  """Draws the whole picture.

  Args:
    workdir: the directory of the run.
    title: the title of the picture.

  Returns:
    A matplotlib figure, 9 inches wide: 900 pixels at 100 dots an inch.

  Raises:
    ConfigError: if the run has written no finite loss.
  """
  history = read_history(workdir)
  rows = history.rows
  if not any(np.isfinite(column(rows, key)).any() for key in ('loss', 'bits_per_byte')):
    raise ConfigError(f'{workdir / "metrics.jsonl"}: expected a run with a finite loss, found none')
  matplotlib.use('Agg')
  from matplotlib import pyplot

  with matplotlib.rc_context(_STYLE):
    layers = len(load_table(rows)[0])
    heights = [3.2, 0.9 + 0.28 * min(layers, 14)] if layers else [3.2]
    figure, axes = pyplot.subplots(
      len(heights),
      1,
      figsize=(9, sum(heights) + 0.7),
      gridspec_kw={'height_ratios': heights},
      layout='constrained',
      squeeze=False,
    )
    draw_curve(axes[0, 0], rows, history.evaluations, history.yardsticks)
    axes[0, 0].set_title(title, loc='left', fontweight='bold', color=_INK)
    if layers:
      draw_loads(axes[1, 0], rows)
      axes[1, 0].set_title('Expert load', loc='left', fontweight='bold', color=_INK)
  return figure


def main(_: Sequence[str]) -> None:
  """Writes the pictures and says where they are."""
  workdir = pathlib.Path(_WORKDIR.value)
  out = pathlib.Path(_OUT.value) if _OUT.value else workdir / 'run'
  if out.suffix in ('.png', '.svg'):
    out = out.with_suffix('')
  figure = draw_run(workdir, _TITLE.value or workdir.resolve().name)
  out.parent.mkdir(parents=True, exist_ok=True)
  for ending, metadata in (('.png', {'Software': None}), ('.svg', {'Date': None})):
    path = out.with_name(out.name + ending)
    with matplotlib.rc_context(_STYLE):
      figure.savefig(path, dpi=200, metadata=metadata)
    print(path)


if __name__ == '__main__':
  app.run(main)
