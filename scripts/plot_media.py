"""Draws what a model was shown beside what it wrote: pictures, clips, sounds, clouds of points."""

import json
import pathlib

from absl import flags

from deepseek_jax.core.config import ConfigError
from scripts import launch, media_panels

USAGE = """
Draws media beside answers.

  python scripts/evaluate.py --workdir=runs/five
  python scripts/plot_media.py --workdir=runs/five [--each=6] [--output=media.png]

  --workdir=DIR     the folder of a run on media that was evaluated
  --each=N          answers of each source, at equal distances (6)
  --output=FILE     the picture (default: media.png in the run's folder)
  --cache_dir=DIR   tokens and plans (default: ~/.cache/deepseek_jax)

Pictures are drawn as they are, clips as a strip of frames, sounds as the loudness in mel bands that
the encoder reads, clouds of points from the front and from above.
"""

WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run')
EACH = flags.DEFINE_integer('each', 6, 'answers of each source', lower_bound=1)
OUTPUT = flags.DEFINE_string('output', None, 'the picture')
CACHE_DIR = flags.DEFINE_string('cache_dir', None, 'folder for tokens and plans')


def main() -> None:
  """Runs the script."""
  from deepseek_jax.data.media.rows import MediaData
  from deepseek_jax.train.workdir import Workdir

  if WORKDIR.value is None:
    raise ConfigError('--workdir is missing; for example --workdir=runs/five')
  workdir = Workdir(pathlib.Path(WORKDIR.value))
  experiment = workdir.read()
  if experiment is None:
    raise ConfigError(f'{workdir.path}: no run here (there is no config.json)')
  answers = workdir.path / 'answers.json'
  if not answers.exists():
    raise ConfigError(
      f'{answers}: no such file; first run scripts/evaluate.py --workdir={workdir.path}'
    )
  found = json.loads(answers.read_text(encoding='utf-8'))
  data = experiment.data.prepare(launch.cache_dir(CACHE_DIR.value))
  if not isinstance(data, MediaData) or not found['answers']:
    raise ConfigError(f'{workdir.path}: no answers about media')
  panels = []
  for split in data.by_source:
    name = split.sources[0].name
    rows = [row for row in found['answers'] if row['source'] == name]
    for row in (rows[i * len(rows) // EACH.value] for i in range(min(EACH.value, len(rows)))):
      source, index = split.where(row['document'])
      kinds = source.records.record('heldout', index).media
      media = source.records.render('heldout', index)
      panels.append((row, list(zip(kinds, media, strict=True))))
  output = pathlib.Path(OUTPUT.value or workdir.path / 'media.png')
  media_panels.draw(panels, getattr(experiment.model, 'sound', None), output)
  print(output)


if __name__ == '__main__':
  launch.run(main, USAGE)
