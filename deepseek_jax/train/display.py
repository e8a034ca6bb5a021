"""What a run shows on the terminal: a live panel, one plain line each n steps, or nothing."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TextIO

import rich.console
import rich.live
import rich.progress_bar
import rich.table
import rich.text

_BARS = '▁▂▃▄▅▆▇█'
_SHOWN_LAYERS = 12
_SHOWN_EXPERTS = 64


class Display(Protocol):
  """Shows the progress of a run."""

  def update(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Shows the numbers of a finished step.

    Args:
      step: the number of finished steps.
      metrics: name → number, list, or dict of lists; None where a number is not finite.
    """

  def message(self, text: str) -> None:
    """Shows one line of text.

    Args:
      text: the line.
    """

  def close(self) -> None:
    """Leaves the terminal as it was."""


class QuietDisplay:
  """Shows nothing."""

  def update(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Shows nothing."""

  def message(self, text: str) -> None:
    """Shows nothing."""

  def close(self) -> None:
    """Does nothing."""


class LineDisplay:
  """Prints one plain line each n steps, in columns of fixed width, easy to search."""

  def __init__(self, total_steps: int, every_steps: int = 1, stream: TextIO | None = None):
    """Remembers the settings.

    Args:
      total_steps: the steps of the whole run.
      every_steps: prints where the step is a multiple of this, and at the first and last update.
      stream: where to print; None is standard output.
    """
    self._total_steps = total_steps
    self._every_steps = every_steps
    self._stream = stream or sys.stdout
    self._started = False

  def update(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Prints the line of a step, if it is one of the steps to print."""
    if self._started and step % self._every_steps and step < self._total_steps:
      return
    self._started = True
    self.message(format_line(step, self._total_steps, metrics))

  def message(self, text: str) -> None:
    """Prints one line."""
    print(text, file=self._stream, flush=True)

  def close(self) -> None:
    """Does nothing: every line is flushed when it is printed."""


class LiveDisplay:
  """Keeps a panel at the foot of the terminal: progress, numbers, and how busy each expert is."""

  def __init__(self, total_steps: int, name: str = '', console: rich.console.Console | None = None):
    """Remembers the settings; the panel appears with the first update.

    Args:
      total_steps: the steps of the whole run.
      name: the run's name.
      console: where to draw; None is the standard output.
    """
    self._total_steps = total_steps
    self._name = name
    self._console = console or rich.console.Console()
    self._live: rich.live.Live | None = None

  def update(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Redraws the panel."""
    if self._live is None:
      self._live = rich.live.Live(console=self._console, refresh_per_second=4)
      self._live.start()
    self._live.update(render_panel(step, self._total_steps, metrics, self._name), refresh=True)

  def message(self, text: str) -> None:
    """Prints one line above the panel."""
    self._console.print(text, markup=False, highlight=False)

  def close(self) -> None:
    """Leaves the last panel on the terminal and stops redrawing it."""
    live, self._live = self._live, None
    if live is not None:
      live.stop()


class Both:
  """Shows everything in two places, such as a terminal and a log."""

  def __init__(self, first: Display, second: Display):
    """Keeps both."""
    self._displays = (first, second)

  def update(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Shows the numbers of a step twice."""
    for display in self._displays:
      display.update(step, metrics)

  def message(self, text: str) -> None:
    """Shows one line twice."""
    for display in self._displays:
      display.message(text)

  def close(self) -> None:
    """Closes both."""
    for display in self._displays:
      display.close()


def make_display(
  total_steps: int,
  *,
  kind: Literal['auto', 'live', 'line', 'quiet'] = 'auto',
  every_steps: int = 1,
  name: str = '',
) -> Display:
  """Makes the display that suits the terminal.

  Args:
    total_steps: the steps of the whole run.
    kind: 'auto' is live on a terminal that can redraw, plain lines elsewhere.
    every_steps: how often plain lines are printed.
    name: the run's name, shown in the live panel.

  Returns:
    The display; `close` it at the end.
  """
  if kind == 'quiet':
    return QuietDisplay()
  console = rich.console.Console()
  redraws = console.is_terminal and not console.is_dumb_terminal
  if kind == 'live' or (kind == 'auto' and redraws):
    return LiveDisplay(total_steps, name, console)
  return LineDisplay(total_steps, every_steps)


def format_count(value: float) -> str:
  """A large number in few letters: 5100 → `5.1k`.

  Args:
    value: any finite number.

  Returns:
    Three significant digits at most, with k, M, G or T.
  """
  for unit in ('', 'k', 'M', 'G', 'T'):
    if abs(value) < 999.5 or unit == 'T':
      break
    value /= 1000
  digits = 1 if unit and abs(value) < 99.95 else 0
  return f'{value:.{digits}f}{unit}'


def format_seconds(seconds: float) -> str:
  """A duration in at most two units: 192 → `3m12s`.

  Args:
    seconds: a finite number of seconds, at least 0.

  Returns:
    Text such as `48s`, `3m12s`, `2h05m` or `4d03h`.
  """
  whole = round(seconds)
  if whole < 60:
    return f'{whole}s'
  if whole < 3600:
    return f'{whole // 60}m{whole % 60:02d}s'
  if whole < 86400:
    return f'{whole // 3600}h{whole % 3600 // 60:02d}m'
  return f'{whole // 86400}d{whole % 86400 // 3600:02d}h'


# Label, key in the metrics, width, text of a finite number.
_COLUMNS: tuple[tuple[str, str, int, Callable[[float], str]], ...] = (
  ('loss', 'loss', 6, lambda x: f'{x:.3f}'),
  ('bits/byte', 'bits_per_byte', 5, lambda x: f'{x:.2f}'),
  ('grad', 'grad_norm', 5, lambda x: f'{x:.2f}'),
  ('lr', 'learning_rate', 7, lambda x: f'{x:.1e}'),
  ('tok/s', 'tokens_per_second', 5, format_count),
  ('mfu', 'mfu', 4, lambda x: f'{x:.0%}'),
  ('left', 'seconds_left', 6, format_seconds),
  ('mem', 'peak_memory_bytes', 7, lambda x: f'{x / 1e9:.1f} GB'),
)


def _texts(metrics: Mapping[str, Any]) -> dict[str, str]:
  """Label → padded text of every column whose number was given; `nan` where it is not finite."""
  texts = {}
  for label, key, width, write in _COLUMNS:
    if key in metrics:
      value = metrics[key]
      known = value is not None and math.isfinite(value)
      texts[label] = (write(value) if known else 'nan').rjust(width)
  return texts


def format_line(step: int, total_steps: int, metrics: Mapping[str, Any]) -> str:
  """One line of plain text about a step.

  Args:
    step: the number of finished steps.
    total_steps: the steps of the whole run.
    metrics: name → number; columns whose number is absent are left out.

  Returns:
    Text such as `step  120/2000   6.0%  loss  4.812  bits/byte  1.70 …`.
  """
  share = step / total_steps if total_steps else 1.0
  head = f'step {step:>{len(str(total_steps))}}/{total_steps}  {share:6.1%}'
  return '  '.join([head, *(f'{label} {text}' for label, text in _texts(metrics).items())])


def load_bars(load: Sequence[float | None]) -> str:
  """One letter an expert: how many tokens it got, against an equal share.

  Args:
    load: the share of the tokens that each expert got, E numbers.

  Returns:
    A half-high bar is the equal share, a full one twice that or more; `·` is an expert that got
    nothing. Neighbours are averaged where there are more than 64.
  """
  shares = [value or 0.0 for value in load]
  experts = len(shares)
  group = max(1, math.ceil(experts / _SHOWN_EXPERTS))
  letters = []
  for start in range(0, experts, group):
    part = shares[start : start + group]
    relative = sum(part) / len(part) * experts
    letters.append('·' if relative == 0 else _BARS[min(7, round(relative * 3.5))])
  return ''.join(letters)


def render_panel(
  step: int, total_steps: int, metrics: Mapping[str, Any], name: str
) -> rich.console.RenderableType:
  """The live panel.

  Args:
    step: the number of finished steps.
    total_steps: the steps of the whole run.
    metrics: name → number; `load` maps a layer's address to the shares of its experts.
    name: the run's name.

  Returns:
    What rich draws: the progress, the numbers, and bars of the most uneven layers.
  """
  top = rich.table.Table.grid(padding=(0, 2))
  top.add_row(
    rich.text.Text(name or 'training', style='bold'),
    rich.progress_bar.ProgressBar(total=total_steps, completed=step, width=40),
    f'{step}/{total_steps}',
  )
  texts = _texts(metrics)
  numbers = rich.table.Table.grid(padding=(0, 3))
  numbers.add_row(*(rich.text.Text(label, style='dim') for label in texts))
  numbers.add_row(*(rich.text.Text(text.strip(), style='bold cyan') for text in texts.values()))
  parts: list[rich.console.RenderableType] = [top, numbers]
  load = metrics.get('load') or {}
  if load:
    busiest = {
      layer: max((x or 0.0) for x in shares) * len(shares) for layer, shares in load.items()
    }
    shown = set(sorted(load, key=lambda layer: -busiest[layer])[:_SHOWN_LAYERS])
    bars = rich.table.Table.grid(padding=(0, 2))
    for layer, shares in load.items():
      if layer in shown:
        bars.add_row(
          rich.text.Text(layer, style='dim'),
          rich.text.Text(load_bars(shares), style='green'),
          f'busiest ×{busiest[layer]:.2f}',
        )
    parts.append(bars)
    if len(load) > len(shown):
      parts.append(
        rich.text.Text(f'the {len(shown)} most uneven of {len(load)} layers', style='dim')
      )
  return rich.console.Group(*parts)
