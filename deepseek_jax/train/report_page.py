"""A run on one page: `report.html`, self-contained, drawn from what the run left in its folder."""

import os
import pathlib
from typing import Any

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.describe import bytes_text, duration, si
from deepseek_jax.core.difference import difference
from deepseek_jax.core.serialise import to_python
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.history import (
  History,
  column,
  loss_key,
  read_history,
  wall_clock,
)
from deepseek_jax.train.page import curves, markup
from deepseek_jax.train.page.chart import draw
from deepseek_jax.train.page.heat import draw_loads, load_figures, modality_table
from deepseek_jax.train.page.samples import draw_samples

MOST_FAULTS = 200
_UNITS = {'loss': 'nats per token', 'bits_per_byte': 'bits per byte'}
_ENDS = ('stopped', 'finished', 'failed')


def write_report(path: pathlib.Path, named: Experiment | None = None) -> pathlib.Path:
  """Draws the report of a run: finished, going on, stopped or killed.

  Args:
    path: the folder of the run.
    named: what the config file of the run gives, to say what the run changed; None leaves it out.

  Returns:
    Path of `report.html` in the folder; an earlier one is replaced whole.

  Raises:
    ConfigError: there is no run in the folder.
  """
  text = report_page(read_history(path), named)
  target = path / 'report.html'
  fresh = target.with_name('report.html.new')
  fresh.write_text(text, encoding='utf-8')
  os.replace(fresh, target)
  return target


def report_page(history: History, named: Experiment | None = None) -> str:
  """Returns the page as HTML.

  Args:
    history: the run.
    named: what the config file of the run gives, or None.
  """
  parts = (
    ('curves', 'Curves', _curves(history)),
    ('experts', 'Experts', _experts(history)),
    ('samples', 'Samples', draw_samples(history.samples)),
    ('evaluations', 'Held-out evaluations', _evaluations(history)),
    ('throughput', 'Throughput', _throughput(history)),
    ('faults', 'Faults met', _faults(history)),
    ('events', 'Starts and stops', _events(history)),
    ('config', 'Config', _config(history, named)),
    ('environment', 'Environment', _environment(history)),
  )
  sections = [(name, title, markup.section(name, title, body)) for name, title, body in parts]
  return markup.document(history.name, _lead(history), sections)


def status(history: History) -> str:
  """Says in a sentence how far the run is and how it ended."""
  total = history.experiment.train_steps if history.experiment else None
  far = f'step {history.step:,}' + (f' of {total:,}' if total else '')
  last: Any = history.events[-1] if history.events else {}
  kind = last.get('event')
  if total and history.step >= total:
    return f'Finished: {far}.'
  if kind == 'stopped':
    return f'Stopped by {last.get("reason", "a signal")}: {far}.'
  if kind == 'failed':
    return f'Failed: {far}. {last.get("reason", "")}'
  if not history.rows:
    return 'Nothing is logged yet.'
  return f'Not finished: {far}. The run is going on, or was killed.'


def _lead(history: History) -> str:
  parts = [markup.paragraph(status(history), 'status')]
  parts += [markup.paragraph(f'Could not be read: {text}', 'warn') for text in history.problems]
  parts.append(markup.tiles(_figures(history)))
  return '\n'.join(parts)


def _figures(history: History) -> list[tuple[str, str, str]]:
  """The large numbers: what, number, remark."""
  rows, found = history.rows, []
  key = loss_key(rows)
  held_out = [row for row in history.evaluations if isinstance(row.get(key), (int, float))]
  if held_out:
    last = held_out[-1]
    whole = 'all held-out text' if last.get('all') else 'part of the held-out text'
    found.append(
      (f'held out, {_UNITS[key]}', f'{last[key]:.4f}', f'step {last["step"]:,}; {whole}')
    )
  values = column(rows, key)
  finite = np.flatnonzero(np.isfinite(values))
  if finite.size:
    at = finite[-1]
    recent = float(np.mean(values[finite[-max(1, len(finite) // 20) :]]))
    remark = f'mean of the last {max(1, len(finite) // 20)} logged; step {rows[at]["step"]:,}'
    found.append((f'training, {_UNITS[key]}', f'{recent:.4f}', remark))
  if rows:
    tokens = _tokens_a_step(history)
    seen = f'{si(tokens * history.step)} tokens' if tokens else ''
    found.append(('steps', f'{history.step:,}', seen))
  clock = wall_clock(rows)
  if np.isfinite(clock).any():
    found.append(('time', duration(float(np.nanmax(clock))), 'pauses between starts left out'))
  rates = column(rows, 'tokens_per_second')
  if np.isfinite(rates).any():
    mfu = column(rows, 'mfu')
    share = f'{np.nanmedian(mfu):.0%} of the matmul peak' if np.isfinite(mfu).any() else ''
    found.append(('tokens/s, median', f'{np.nanmedian(rates):,.0f}', share))
  memory = column(rows, 'peak_memory_bytes')
  if np.isfinite(memory).any():
    found.append(('peak memory', bytes_text(float(np.nanmax(memory))), ''))
  found.append(('faults', f'{len(history.faults)}' if history.faults else 'none', ''))
  return found


def _tokens_a_step(history: History) -> int | None:
  data = getattr(history.experiment, 'data', None)
  return data.batch_size * data.length if data is not None else None


def _curves(history: History) -> str:
  if not history.rows:
    return markup.paragraph('nothing is logged yet', 'empty')
  charts = [curves.loss_chart(history), *curves.other_charts(history)]
  return f'<div class="charts">{"".join(map(draw, charts))}</div>'


def _experts(history: History) -> str:
  picture = draw_loads(history.rows)
  if not picture:
    return markup.paragraph('no expert loads were logged', 'empty')
  charts = ''.join(map(draw, curves.expert_charts(history)))
  rows = load_figures(history.rows)
  headers = ('layer', 'busiest × equal share', 'dead experts', 'steps with dead', 'entropy')
  caption = 'At the last logged step'
  table = markup.table(headers, rows, caption, numeric=4)
  if media := modality_table(history.rows):
    names = ('layer', 'modality', 'busiest × equal share', 'choices that text does not share')
    table += markup.table(names, media, 'By modality, at the last logged step', numeric=2)
  return f'<div class="charts">{picture}{charts}</div>{table}'


def _evaluations(history: History) -> str:
  rows = history.evaluations
  names = [
    name
    for name in dict.fromkeys(name for row in rows for name in row)
    if name != 'step' and any(_is_number(row.get(name)) for row in rows)
  ]
  if not names:
    return markup.paragraph('none yet', 'empty')
  cells = [
    (f'{row["step"]:,}', 'all' if row.get('all') else 'part', *(_cell(row.get(n)) for n in names))
    for row in rows
  ]
  headers = ('step', 'text', *(name.replace('_', ' ') for name in names))
  parts = [markup.table(headers, cells, numeric=len(names))]
  last = next((r for r in reversed(rows) if _is_number(r.get('bits_per_byte'))), None)
  if history.yardsticks and last is not None:
    mine = last['bits_per_byte']
    figures = sorted([*history.yardsticks.items(), (f'▶ {history.name}', mine)], key=lambda x: x[1])
    lines = [
      (name, f'{value:.4f}', '' if name.startswith('▶') else f'{mine - value:+.4f}')
      for name, value in figures
    ]
    headers = ('held-out text', 'bits per byte', 'this run against it')
    parts.append(markup.table(headers, lines, 'Beside other ways to predict it', numeric=2))
  return '\n'.join(parts)


def _throughput(history: History) -> str:
  rows, lines = history.rows, []
  tokens = _tokens_a_step(history)
  rates = column(rows, 'tokens_per_second')
  measures = [
    ('tokens per second', rates, lambda x: f'{x:,.0f}'),
    ('share of the matmul peak (MFU)', column(rows, 'mfu'), lambda x: f'{x:.1%}'),
    ('wait for the next batch', column(rows, 'host_seconds'), duration),
  ]
  if tokens:
    with np.errstate(divide='ignore', invalid='ignore'):
      measures.insert(1, ('time of a step', tokens / rates, duration))
  for name, values, write in measures:
    known = values[np.isfinite(values)]
    if known.size:
      figures = (np.median(known), known.min(), known.max(), known[-1])
      lines.append((name, *(write(float(x)) for x in figures)))
  if not lines:
    return markup.paragraph('not measured yet: it takes two logged steps', 'empty')
  headers = ('over the logged steps', 'median', 'lowest', 'highest', 'last')
  note = 'Evaluation, samples and checkpoints are left out of the times.'
  stages = None if history.experiment is None else history.experiment.stages
  if stages is not None:
    note += f' By its schedule, a stage is idle in {stages.bubble_share:.1%} of the ticks.'
  return markup.table(headers, lines, numeric=4) + markup.paragraph(note, 'note')


def _faults(history: History) -> str:
  rows = history.faults
  if not rows:
    return markup.paragraph('none')
  lines = [
    (
      f'{row["step"]:,}',
      row.get('kind', ''),
      row.get('message', ''),
      '; '.join(str(x) for x in (row.get('titles') or row.get('documents') or ())[:6]),
    )
    for row in rows[:MOST_FAULTS]
  ]
  left = len(rows) - len(lines)
  more = markup.paragraph(f'and {left:,} more in faults.jsonl', 'note') if left else ''
  return markup.table(('step', 'kind', 'what', 'documents of the batch'), lines) + more


def _events(history: History) -> str:
  lines: list[tuple[object, ...]] = []
  rows: Any = history.events
  for at, row in enumerate(rows):
    kind = row.get('event', '')
    lines.append((_moment(row.get('time')), f'{row["step"]:,}', kind, row.get('reason', '')))
    following = rows[at + 1].get('event') if at + 1 < len(rows) else None
    if kind not in _ENDS and following is not None and following not in _ENDS:
      lines.append(('', '', 'killed', 'no end was noted before the next start'))
  if lines:
    return markup.table(('time (UTC)', 'step', 'event', 'reason'), lines)
  clock = column(history.rows, 'elapsed_seconds')
  drops = np.flatnonzero(np.diff(clock) < 0).tolist()
  if not drops:
    return markup.paragraph('not noted; the clock of the log ran through, so there was one start')
  steps = ', '.join(f'{history.rows[at]["step"]:,}' for at in drops)
  return markup.paragraph(f'not noted; the clock of the log starts anew after step {steps}')


def _moment(time: Any) -> str:
  """`2026-11-22 04:13:40` out of a time in ISO 8601."""
  return str(time or '').replace('T', ' ').removesuffix('+00:00')


def _config(history: History, named: Experiment | None) -> str:
  experiment = history.experiment
  if experiment is None:
    return markup.paragraph('config.json could not be read', 'empty')
  parts = []
  if named is None:
    parts.append(markup.paragraph('No config file of this name was found to compare with.', 'note'))
  else:
    changes = difference(named, experiment)
    lines = [(change.path, spell(change.old), spell(change.new)) for change in changes]
    title = f'What differs from the file of {named.name!r}'
    parts.append(
      markup.table(('field', 'in the file', 'in this run'), lines, title)
      if lines
      else markup.paragraph(f'Nothing differs from the file of {named.name!r}.')
    )
  parts.append(markup.code(to_python(experiment), 'The config as Python'))
  return '\n'.join(parts)


def spell(value: Any) -> str:
  """A field's value as Python."""
  try:
    return to_python(value)
  except ConfigError:
    return repr(value)


def _environment(history: History) -> str:
  if not history.environment:
    return markup.paragraph('not noted', 'empty')
  current = {name: part for name, part in history.environment.items() if name != 'earlier'}
  parts = [markup.table(('what', 'at the last start'), _flat(current))]
  for part in history.environment.get('earlier') or ():
    told = dict(_flat(current))
    changed = [(name, value) for name, value in _flat(part) if told.get(name) != value]
    parts.append(markup.table(('what', 'at an earlier start'), changed))
  return '\n'.join(parts)


def _flat(part: Any, prefix: str = '') -> list[tuple[str, str]]:
  """Nested plain data as lines."""
  if isinstance(part, dict):
    found = []
    for name, value in part.items():
      found += _flat(value, f'{prefix} {name}'.strip())
    return found
  if isinstance(part, list):
    return [(prefix, ', '.join(map(str, part)))]
  if prefix.endswith('_bytes') and isinstance(part, (int, float)):
    return [(prefix.removesuffix('_bytes'), bytes_text(part))]
  return [(prefix, str(part))]


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
  if not _is_number(value):
    return '—'
  return f'{value:,}' if isinstance(value, int) else f'{value:.4f}'
