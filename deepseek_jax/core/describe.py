"""Numbers and tables as text for people."""

import math
from collections.abc import Sequence
from typing import Any

_SCALES = ('', ' K', ' M', ' B', ' T', ' Q')
_BYTE_UNITS = ('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
  """Rows as aligned plain text.

  Columns whose cells are all numbers are aligned to the right.

  Args:
    rows: cells of any type, shown by `str`; every row as long as the headers.
    headers: of the columns.

  Returns:
    Lines without a line end after the last: the headers, a rule, and one line a row.

  Raises:
    ValueError: a row has more or fewer cells than there are headers.
  """
  for row in rows:
    if len(row) != len(headers):
      raise ValueError(f'the row {tuple(row)!r} has {len(row)} cells, not {len(headers)}')
  cells = [[str(cell) for cell in row] for row in rows]
  widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
  numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(headers))]

  def line(parts: Sequence[str]) -> str:
    padded = [
      part.rjust(width) if right else part.ljust(width)
      for part, width, right in zip(parts, widths, numeric)
    ]
    return '  '.join(padded).rstrip()

  rule = '  '.join('-' * width for width in widths)
  return '\n'.join([line(headers), rule, *(line(parts) for parts in cells)])


def _is_number(cell: Any) -> bool:
  """Numbers, and texts that begin with one, such as '671.03 B' and '12%'."""
  if isinstance(cell, bool):
    return False
  try:
    float(str(cell).split()[0].rstrip('%').replace(',', ''))
  except (ValueError, IndexError):
    return False
  return True


def si(number: float) -> str:
  """A large number in thousands, millions, billions …: 671_026_419_200 is '671.03 B'.

  Args:
    number: of parameters, tokens, operations; below a thousand it is shown as it is.
  """
  if not math.isfinite(number):
    return str(float(number))
  if abs(number) < 1000:
    return str(number) if isinstance(number, int) else f'{number:.4g}'
  value, scale = float(number), 0
  # 999,999 would round to '1000.00 K': what is shown decides, not what is there.
  while abs(round(value, 2)) >= 1000 and scale + 1 < len(_SCALES):
    value, scale = value / 1000, scale + 1
  return f'{value:.2f}{_SCALES[scale]}'


def bytes_text(number: float) -> str:
  """An amount of memory in powers of 1,024: 1_610_612_736 is '1.50 GiB'.

  Args:
    number: of bytes.
  """
  value, unit = float(number), 0
  while abs(round(value, 2)) >= 1024 and unit + 1 < len(_BYTE_UNITS):
    value, unit = value / 1024, unit + 1
  return f'{value:.2f} {_BYTE_UNITS[unit]}' if unit else f'{number:.0f} B'


def duration(seconds: float) -> str:
  """A time span with two units at most: '850 ms', '12.3 s', '3 min 05 s', '1 h 02 min', '2 d 03 h'.

  Args:
    seconds: may be negative; infinite and unknown (nan) spans are shown as '∞' and '?'.
  """
  if math.isnan(seconds):
    return '?'
  if seconds < 0:
    return f'-{duration(-seconds)}'
  if math.isinf(seconds):
    return '∞'
  if seconds < 0.9995:
    milliseconds = seconds * 1000
    return f'{milliseconds:.0f} ms' if milliseconds >= 10 else f'{milliseconds:.3g} ms'
  if seconds < 59.95:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f'{minutes} min {rest:02d} s'
  hours, minutes = divmod(round(seconds / 60), 60)
  if hours < 24:
    return f'{hours} h {minutes:02d} min'
  days, hours = divmod(round(seconds / 3600), 24)
  return f'{days} d {hours:02d} h'
