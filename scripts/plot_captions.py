"""Draws the pictures that a run described, its captions and the true ones, as one PNG."""

import base64
import io
import json
import pathlib
import textwrap
from typing import Any

from absl import flags

from scripts import launch

USAGE = """
Draws pictures beside captions.

  python scripts/plot_captions.py --workdir=runs/captions [--output=captions.png]

  --workdir=DIR           the folder of a run on captioned pictures
  --output=FILE           the picture (default: captions.png in the run's folder)

Takes the last samples of the run: held-out pictures, what the model wrote, and their own captions.
"""

WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run')
OUTPUT = flags.DEFINE_string('output', None, 'the picture')
COLUMNS = 3


def main() -> None:
  """Runs the script."""
  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.train.workdir import Workdir

  if WORKDIR.value is None:
    raise ConfigError('--workdir is missing; for example --workdir=runs/captions')
  workdir = Workdir(pathlib.Path(WORKDIR.value))
  lines = (
    workdir.samples.read_text(encoding='utf-8').splitlines() if workdir.samples.exists() else []
  )
  rows = [row for line in lines if 'image' in (row := json.loads(line))]
  if not rows:
    raise ConfigError(f'{workdir.path}: no samples with pictures')
  rows = [row for row in rows if row['step'] == rows[-1]['step']]
  output = pathlib.Path(OUTPUT.value or workdir.path / 'captions.png')
  draw(rows, output)
  print(output)


def draw(rows: list[dict[str, Any]], output: pathlib.Path) -> None:
  """Draws one panel a row."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt
  from PIL import Image

  height = -(-len(rows) // COLUMNS)
  figure, axes = plt.subplots(
    height, COLUMNS, figsize=(4.6 * COLUMNS, 1.25 * height), squeeze=False
  )
  for axis in axes.flat:
    axis.set_axis_off()
  for axis, row in zip(axes.flat, rows):
    packed = base64.b64decode(row['image'].partition(',')[2])
    with Image.open(io.BytesIO(packed)) as image:
      axis.imshow(image.convert('RGB'), extent=(0, 1, 0, 1))
    axis.set_xlim(0, 4.4)
    axis.set_ylim(0, 1)
    for place, name, color in ((0.98, 'text', '#111111'), (0.46, 'reference', '#777777')):
      label = 'model' if name == 'text' else 'true'
      text = '\n'.join(textwrap.wrap(f'{label}: {row[name]}', 46))
      axis.text(1.12, place, text, va='top', fontsize=8, color=color)
  figure.tight_layout(pad=0.6)
  figure.savefig(output, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  launch.run(main, USAGE)
