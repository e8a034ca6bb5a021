"""Expert loads over layers and time, as one small picture."""

import base64
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from deepseek_jax.train.history import LOAD_COLOURS, Rows, load_table
from deepseek_jax.train.page.chart import nice_ticks, tick_text
from deepseek_jax.train.page.markup import escape

MOST_COLUMNS = 240
MOST_ROWS = 640
_CLEAR = 255  # the palette's entry for nothing
_PIXELS = 4  # across and down for each value: printers and PDF readers blur single ones


def draw_loads(rows: Rows) -> str:
  """Returns a figure with a band for each layer and a line for each expert, '' without loads.

  Args:
    rows: the rows of `metrics.jsonl`, some with a `load`.
  """
  layers, steps, table = load_table(rows)
  if not layers or not np.isfinite(table).any():
    return ''
  experts = table.shape[1]
  columns = resample(table, steps)
  height = max(4, min(experts, MOST_ROWS // len(layers)))
  bands = np.stack([squeeze(band, height) for band in columns])
  picture, centres = stack_bands(bands)
  last = max(1, int(steps[-1]))
  shown = range(0, len(layers), math.ceil(len(layers) / 20))
  labels = ''.join(
    f'<span class="y" style="top:{100 * centres[i]:.2f}%">{escape(short(layers[i]))}</span>'
    for i in shown
  )
  ticks = ''.join(
    f'<span class="x" style="left:{100 * x / last:.2f}%">{tick_text(x)}</span>'
    for x in nice_ticks(0, last, 6)
  )
  lines = (
    'one line an expert'
    if height == experts
    else f'{height} of {experts} experts, sorted by load at each step; the least and the most '
    'loaded are always among them'
  )
  text = (
    f'Load of {experts} experts in {len(layers)} layers from step {steps[0]} to {last}. '
    f'{_dead(table, layers)}'
  )
  return (
    f'<figure class="chart wide heat" data-x="0 {last}" data-stops="{" ".join(LOAD_COLOURS)}" '
    f'data-layers="{escape(" ".join(short(layer) for layer in layers))}" '
    f'data-band="{height}" data-gap="{band_gap(height)}" data-pixels="{_PIXELS}" '
    f'data-sorted="{int(height != experts)}">'
    f'<figcaption>Load of the experts <span class="measure">layer by layer, {lines}</span>'
    '</figcaption>'
    '<ul class="legend bar"><li>0, dead</li><li class="ramp" aria-hidden="true"></li>'
    '<li>twice an equal share, or more</li><li>(lightest: an equal share)</li></ul>'
    f'<div class="plot" style="height:{min(620, max(150, 4 * picture.shape[0]))}px">'
    f'<img alt="{escape(text)}" src="{png(picture.repeat(_PIXELS, 0).repeat(_PIXELS, 1))}">'
    f'{labels}{ticks}'
    '<span class="unit">step</span></div></figure>'
  )


def short(layer: str) -> str:
  """`layers/3` as `3`; other addresses stay."""
  return layer.removeprefix('layers/').split('/')[0] if layer.startswith('layers/') else layer


def resample(table: np.ndarray, steps: np.ndarray) -> np.ndarray:
  """Loads at evenly spaced steps: at each, the latest that was logged by then.

  Args:
    table: float64 [L, E, S].
    steps: int64 [S], rising.

  Returns:
    float64 [L, E, C], C at most 240.
  """
  count = min(MOST_COLUMNS, max(1, len(steps)))
  edges = np.linspace(0, steps[-1], count + 1)[1:]
  at = np.maximum(np.searchsorted(steps, edges + 1e-9, side='right') - 1, 0)
  return table[:, :, at]


def squeeze(band: np.ndarray, height: int) -> np.ndarray:
  """One layer's loads in fewer lines: sorted, the lowest and highest kept.

  Args:
    band: float64 [E, C].
    height: lines to keep.

  Returns:
    float64 [height, C]; unchanged where there are no more experts than that.
  """
  if len(band) <= height:
    return np.pad(band, ((0, height - len(band)), (0, 0)), constant_values=math.nan)
  chosen = np.linspace(0, len(band) - 1, height).round().astype(np.int64)
  return np.sort(band, axis=0)[chosen]


def stack_bands(bands: np.ndarray) -> tuple[np.ndarray, list[float]]:
  """Puts layers under each other with a gap between them.

  Args:
    bands: float64 [L, H, C].

  Returns:
    float64 [rows, C], NaN in the gaps; and the middle of each layer as a share of the height.
  """
  layers, height, columns = bands.shape
  gap = band_gap(height)
  padded = np.full((layers, height + gap, columns), math.nan)
  padded[:, :height] = bands
  picture = padded.reshape(layers * (height + gap), columns)[:-gap]
  centres = [(i * (height + gap) + height / 2) / len(picture) for i in range(layers)]
  return picture, centres


def band_gap(height: int) -> int:
  """Lines between two layers."""
  return max(1, round(height / 8))


def png(picture: np.ndarray) -> str:
  """Loads as a picture in a `data:` address.

  Args:
    picture: float64 [H, W]; 0 and below is the first colour, 2 and above the last, NaN clear.
  """
  values = np.nan_to_num(np.clip(picture, 0, 2), nan=0.0)
  indices = np.where(np.isfinite(picture), np.round(values * 127), _CLEAR).astype(np.uint8)
  height, width = indices.shape
  rows = np.concatenate([np.zeros((height, 1), np.uint8), indices], axis=1)
  palette = np.append(colours(255), [[0, 0, 0]], axis=0).astype(np.uint8)
  content = b'\x89PNG\r\n\x1a\n' + b''.join(
    _chunk(kind, data)
    for kind, data in (
      (b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 3, 0, 0, 0)),
      (b'PLTE', palette.tobytes()),
      (b'tRNS', b'\xff' * 255 + b'\0'),
      (b'IDAT', zlib.compress(rows.tobytes(), 9)),
      (b'IEND', b''),
    )
  )
  return f'data:image/png;base64,{base64.b64encode(content).decode()}'


def colours(count: int) -> np.ndarray:
  """The load's colours from idle to busy.

  Args:
    count: how many.

  Returns:
    float64 [count, 3] of 0 to 255.
  """
  stops = np.array([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in LOAD_COLOURS])
  at = np.linspace(0, len(stops) - 1, count)
  parts = [np.interp(at, np.arange(len(stops)), stops[:, channel]) for channel in range(3)]
  return np.round(np.stack(parts, axis=1))


def _chunk(kind: bytes, data: bytes) -> bytes:
  check = zlib.crc32(kind + data)
  return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', check)


def _dead(table: np.ndarray, layers: Sequence[str]) -> str:
  """Which experts got nothing at the last logged step."""
  last = table[:, :, -1]
  dead = [
    f'{np.count_nonzero(last[i] == 0)} in layer {short(layer)}'
    for i, layer in enumerate(layers)
    if (last[i] == 0).any()
  ]
  return f'Without a token at the end: {", ".join(dead)}.' if dead else 'At the end none is dead.'


def load_figures(rows: Rows) -> list[tuple[str, str, str, str, str]]:
  """A line for each layer: address, busiest over an equal share, dead, share of steps, entropy.

  Args:
    rows: the rows of `metrics.jsonl`, some with a `load`.
  """
  layers, _, table = load_table(rows)
  found = []
  for index, layer in enumerate(layers):
    band = table[index][np.isfinite(table[index][:, -1])]
    last = band[:, -1] if len(band) else np.zeros(0)
    if not len(last):
      found.append((short(layer), '—', '—', '—', '—'))
      continue
    shares = last[last > 0] / max(last.sum(), 1e-30)
    entropy = -(shares * np.log(shares)).sum() / math.log(max(len(last), 2))
    often = (band == 0).any(axis=0).mean()
    dead = f'{np.count_nonzero(last == 0)} of {len(last)}'
    found.append((short(layer), f'{last.max():.2f}', dead, f'{often:.0%}', f'{entropy:.3f}'))
  return found


def modality_table(rows: Rows) -> list[tuple[str, str, str, str]]:
  """A line for each layer and modality that came: which experts it went to.

  Args:
    rows: the rows of `metrics.jsonl`; the last with a `modality_load` counts.

  Returns:
    Layer, modality, busiest expert over an equal share, and the share of choices that would have
    to go to other experts for the modality to be spread as text is.
  """
  logged = (row['modality_load'] for row in reversed(rows) if row.get('modality_load'))
  last: dict[str, list[float]] = next(logged, {})
  found = []
  for address, shares in last.items():
    layer, _, kind = address.rpartition('/')
    own, text = np.array(shares), last.get(f'{layer}/text')
    apart = '—'
    if text is not None and kind != 'text':
      apart = f'{np.abs(own - np.array(text)).sum() / 2:.0%}'
    found.append((short(layer), kind, f'{own.max() * len(own):.2f}', apart))
  return found
