"""Panels of media beside answers: what a model was shown, asked, and wrote."""

import pathlib
import textwrap
from typing import Any

COLUMNS = 2


def picture_of(kind: str, medium: Any, sound: Any) -> Any:
  """Returns a medium as an array to be shown, [H, W, 3] or [H, W].

  Args:
    kind: 'image', 'video', 'sound' or 'points'.
    medium: the array that the model is shown.
    sound: config of the encoder of sounds.
  """
  import jax.numpy as jnp
  import numpy as np

  from deepseek_jax.layers.encoders.line import sound_features
  from deepseek_jax.ops.stft import frames

  if kind == 'image':
    return medium
  if kind == 'video':
    return np.concatenate(list(medium), axis=1)
  if kind == 'sound':
    loud = sound_features(sound, frames(jnp.asarray(medium), sound.window, sound.hop))
    return np.asarray(loud).T[::-1]
  return np.concatenate([view(medium, up=2), view(medium, up=1)], axis=1)


def view(points: Any, up: int, side: int = 96) -> Any:
  """Returns points [P, 6] seen along one axis, the nearest on top: [side, side, 3].

  Args:
    points: places and colours.
    up: the coordinate that is up: 2 from the front, 1 from above.
    side: pixels.
  """
  import numpy as np

  places, colours = np.asarray(points)[:, :3], np.asarray(points)[:, 3:]
  span = np.abs(places).max() + 1e-6
  x = ((places[:, 0] / span + 1) / 2 * (side - 4)).astype(int)
  y = ((1 - places[:, up] / span) / 2 * (side - 4)).astype(int)
  depth = places[:, 3 - up]
  shown = np.ones((side, side, 3))
  for point in np.argsort(-depth if up == 2 else depth):
    shown[y[point] : y[point] + 3, x[point] : x[point] + 3] = colours[point]
  return np.clip(shown, 0, 1)


def draw(panels: list[tuple[dict[str, Any], list]], sound: Any, output: pathlib.Path) -> None:
  """Draws one panel an answer: its media, what was asked and written, and what is true."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  height = -(-len(panels) // COLUMNS)
  figure, axes = plt.subplots(
    height, 2 * COLUMNS, figsize=(6.6 * COLUMNS, 1.3 * height), squeeze=False
  )
  for axis in axes.flat:
    axis.set_axis_off()
  for number, (row, media) in enumerate(panels):
    line = axes[number // COLUMNS]
    shown, words = line[2 * (number % COLUMNS)], line[2 * (number % COLUMNS) + 1]
    if media:
      kind, medium = media[0]
      shape = {'aspect': 'auto', 'cmap': 'magma'} if kind == 'sound' else {}
      shown.imshow(picture_of(kind, medium, sound), **shape)
    texts = [('asked', row['given'], '#555555')] if row['given'].strip() else []
    texts += [('model', row['text'], '#111111'), ('true', row['reference'], '#777777')]
    for place, (label, text, colour) in enumerate(texts):
      wrapped = textwrap.shorten(f'{label}: {text.strip()}', 96, placeholder=' …')
      words.text(
        0,
        0.95 - place * 0.9 / len(texts),
        '\n'.join(textwrap.wrap(wrapped, 48)),
        va='top',
        fontsize=8,
        color=colour,
      )
  figure.tight_layout(pad=0.6)
  figure.savefig(output, dpi=110)
  plt.close(figure)
