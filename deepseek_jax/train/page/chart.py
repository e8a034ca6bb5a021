"""Line charts as HTML and SVG: lines stretch with the page, words keep their size."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from deepseek_jax.train.history import thin
from deepseek_jax.train.page.markup import escape

MOST_POINTS = 400
_SIZE = 1000  # of the SVG's own coordinates, both ways
_APART = 6.5  # per cent of the height between two names of levels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """One line of a chart.

  Attributes:
    label: in the legend; '' leaves it out there.
    x: float64 [n], rising.
    y: float64 [n]; what is not finite is a gap.
    kind: how it is drawn: a line, a faint one behind another, or points on a line.
    colour: number of the colour and of the dashes, 0 to 5.
  """

  label: str
  x: np.ndarray
  y: np.ndarray
  kind: Literal['line', 'faint', 'points'] = 'line'
  colour: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
  """A chart.

  Attributes:
    title: above it.
    unit: of the y axis, beside the title.
    x_unit: of the x axis.
    lines: what is drawn.
    scale: of the y axis; a logarithmic one falls back to linear where a value is not positive.
    y_range: lowest and highest value shown, or None for all.
    levels: dashed lines across: name → value.
    size: 'wide' takes the whole width of the page.
    note: small print under the chart.
  """

  title: str
  unit: str
  x_unit: str = 'step'
  lines: Sequence[Line]
  scale: Literal['linear', 'log'] = 'linear'
  y_range: tuple[float, float] | None = None
  levels: Mapping[str, float] = dataclasses.field(default_factory=dict)
  size: Literal['wide', 'small'] = 'small'
  note: str = ''


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
  """Round numbers inside a range, at most `most`.

  Args:
    low: lower end.
    high: upper end, above the lower.
    most: at least 2.
  """
  rough = (high - low) / (most - 1)
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(power * x for x in (1, 2, 2.5, 5, 10) if power * x >= rough * (1 - 1e-9))
  first = math.ceil(low / step - 1e-9)
  last = math.floor(high / step + 1e-9)
  return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
  """Powers of ten inside a range, or with 2 and 5 between them where they are few.

  Args:
    low: lower end, positive.
    high: upper end, above the lower.
  """
  decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  for parts in ((1,), (1, 3), (1, 2, 5)):
    found = [f * 10.0**d for d in decades for f in parts if low <= f * 10.0**d <= high]
    if len(found) >= 3:
      return found[:: math.ceil(len(found) / 6)]
  return nice_ticks(low, high, 5)


def tick_text(value: float) -> str:
  """A tick's number in few letters: `20k`, `0.003`, `3e-5`."""
  if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
    head, _, power = f'{value:.3g}'.partition('e')
    return f'{head}e{int(power)}' if power else head
  if abs(value) >= 1e6:
    return f'{value / 1e6:.4g}M'
  return f'{value / 1e3:.4g}k' if abs(value) >= 1e4 else f'{value:.6g}'


def draw(chart: Chart) -> str:
  """Returns the chart as a `<figure>`, or a remark where no value is finite."""
  lines = [line for line in chart.lines if _finite(line).any()]
  if not lines:
    body = '<p class="empty">no finite value was logged</p>'
    return f'<figure class="chart {chart.size}">{_caption(chart)}{body}</figure>'
  frame = _frame(chart, lines)
  svg = [
    f'<svg viewBox="0 0 {_SIZE} {_SIZE}" preserveAspectRatio="none" role="img" '
    f'aria-label="{escape(_summary(chart, lines))}"><title>{escape(chart.title)}</title>',
    _grid(frame),
    *(_level(frame, value) for value in chart.levels.values()),
    *(_path(frame, line) for line in lines),
    '</svg>',
  ]
  low, high, bottom, top = frame.x_low, frame.x_high, frame.y_low, frame.y_high
  note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ''
  names = ' named' if chart.levels else ''
  return (
    f'<figure class="chart {chart.size}{names}" data-x="{low:.10g} {high:.10g}" '
    f'data-y="{bottom:.10g} {top:.10g}" data-scale="{frame.scale}" '
    f'data-unit="{escape(chart.x_unit)}">{_caption(chart)}{_legend(chart, lines)}'
    f'<div class="plot">{"".join(svg)}{_words(frame, chart)}</div>{note}</figure>'
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Frame:
  """Where values lie."""

  x_low: float
  x_high: float
  y_low: float
  y_high: float
  scale: str

  def x(self, value: np.ndarray) -> np.ndarray:
    return (value - self.x_low) / (self.x_high - self.x_low)

  def y(self, value: np.ndarray) -> np.ndarray:
    low, high = self.y_low, self.y_high
    if self.scale == 'log':
      value, low, high = np.log(np.maximum(value, 1e-300)), math.log(low), math.log(high)
    return 1 - (value - low) / (high - low)

  def y_ticks(self, most: int) -> list[float]:
    ticks = nice_ticks(self.y_low, self.y_high, most)
    return log_ticks(self.y_low, self.y_high) if self.scale == 'log' else ticks


def _finite(line: Line) -> np.ndarray:
  return np.isfinite(line.x) & np.isfinite(line.y)


def _frame(chart: Chart, lines: Sequence[Line]) -> _Frame:
  xs = np.concatenate([line.x[_finite(line)] for line in lines])
  ys = np.concatenate([line.y[_finite(line)] for line in lines])
  low, high = float(ys.min()), float(ys.max())
  scale = 'log' if chart.scale == 'log' and low > 0 and high > 1.5 * low else 'linear'
  if chart.y_range:
    low, high = chart.y_range
  elif scale == 'log':
    margin = (high / low) ** 0.06
    low, high = low / margin, high * margin
  else:
    spread = high - low or abs(high) * 0.2 or 1.0
    # Zero is the natural foot of what is never negative, unless all of it is far from there.
    natural = 0 <= low < 0.6 * high or low == high >= 0
    low = 0.0 if natural else low - 0.07 * spread
    high += 0.07 * spread
  first = min(0.0, float(xs.min()))
  last = float(xs.max())
  return _Frame(
    x_low=first,
    # A little more than the last value, so that a point there is whole.
    x_high=last + 0.015 * (last - first) if last > first else first + 1.0,
    y_low=low,
    y_high=high,
    scale=scale,
  )


def _grid(frame: _Frame) -> str:
  heights = _SIZE * frame.y(np.array(frame.y_ticks(6)))
  return f'<path class="grid" d="{"".join(f"M0 {y:.1f}H{_SIZE}" for y in heights)}"/>'


def _level(frame: _Frame, value: float) -> str:
  height = _SIZE * float(frame.y(np.array(value)))
  return f'<path class="level" d="M0 {height:.1f}H{_SIZE}"/>'


def _path(frame: _Frame, line: Line) -> str:
  x, y = thin(line.x, line.y, MOST_POINTS)
  xs, ys = _SIZE * frame.x(x), _SIZE * frame.y(y)
  finite = np.isfinite(xs) & np.isfinite(ys)
  words, pen = [], 'M'
  for at in range(len(xs)):
    if not finite[at]:
      pen = 'M'
      continue
    # Far outside it makes no difference where, and the numbers stay short.
    words.append(f'{pen}{xs[at]:.1f} {min(max(ys[at], -_SIZE), 2 * _SIZE):.1f}')
    pen = 'L'
  data = ''.join(words)
  colour = f'c{line.colour}'
  dots = ''.join(
    f'M{xs[at]:.1f} {ys[at]:.1f}h0'
    for at in np.flatnonzero(finite).tolist()
    if line.kind == 'points' or _alone(finite, at)
  )
  name = f' data-label="{escape(line.label)}"' if line.label else ''
  drawn = f'<path class="line {line.kind} {colour}"{name} d="{data}"/>'
  if dots and line.kind != 'faint':
    drawn += f'<path class="halo" d="{dots}"/><path class="dots {colour}" d="{dots}"/>'
  return drawn


def _alone(finite: np.ndarray, at: int) -> bool:
  """Whether a point has no neighbour to draw a line to."""
  return not finite[max(0, at - 1) : at].any() and not finite[at + 1 : at + 2].any()


def _words(frame: _Frame, chart: Chart) -> str:
  most = 6 if chart.size == 'wide' else 4
  parts = []
  for value in frame.y_ticks(6):
    top = 100 * float(frame.y(np.array(value)))
    if -0.5 <= top <= 100.5:
      parts.append(f'<span class="y" style="top:{top:.2f}%">{tick_text(value)}</span>')
  for value in nice_ticks(frame.x_low, frame.x_high, most):
    left = 100 * float(frame.x(np.array(value)))
    parts.append(f'<span class="x" style="left:{left:.2f}%">{tick_text(value)}</span>')
  parts.append(f'<span class="unit">{escape(chart.x_unit)}</span>')
  at = 200.0
  for number, (name, value) in enumerate(sorted(chart.levels.items(), key=lambda item: item[1])):
    true = 100 * float(frame.y(np.array(value)))
    at = min(true, at - _APART)
    parts.append(
      f'<span class="name" style="top:{at:.2f}%"><b>{_letter(number)}</b>'
      f'<span class="full">{escape(name)} <i>{value:.3g}</i></span></span>'
    )
  return ''.join(parts)


def _letter(number: int) -> str:
  return chr(ord('A') + number % 26)


def _caption(chart: Chart) -> str:
  unit = f' <span class="measure">{escape(chart.unit)}</span>' if chart.unit else ''
  return f'<figcaption>{escape(chart.title)}{unit}</figcaption>'


def _legend(chart: Chart, lines: Sequence[Line]) -> str:
  entries = [
    f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true">'
    f'<path class="line {line.kind} c{line.colour}" d="M1 4H23"/>'
    + (f'<path class="dots c{line.colour}" d="M12 4h0"/>' if line.kind == 'points' else '')
    + f'</svg>{escape(line.label)}</li>'
    for line in lines
    if line.label
  ]
  levels = [
    f'<li class="narrow"><b>{_letter(number)}</b> {escape(name)} {value:.3g}</li>'
    for number, (name, value) in enumerate(sorted(chart.levels.items(), key=lambda x: x[1]))
  ]
  if len(entries) + len(levels) < 2:
    return ''
  return f'<ul class="legend">{"".join(entries + levels)}</ul>'


def _summary(chart: Chart, lines: Sequence[Line]) -> str:
  """What somebody who cannot see the chart is told."""
  said = [f'{chart.title}, {chart.unit}' if chart.unit else chart.title]
  for line in lines:
    if line.label:
      x, y = line.x[_finite(line)], line.y[_finite(line)]
      said.append(
        f'{line.label}: {y[0]:.4g} at {chart.x_unit} {x[0]:.6g}, {y[-1]:.4g} at {x[-1]:.6g}, '
        f'lowest {y.min():.4g}, highest {y.max():.4g}'
      )
  said += [f'{name}: {value:.4g}' for name, value in chart.levels.items()]
  return '. '.join(said)
