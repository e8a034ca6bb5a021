"""Compares runs: what their configs differ in, and what came of it."""

import pathlib

from absl import flags

from deepseek_jax.core.config import ConfigError
from scripts import launch

USAGE = """
Compares runs: their configs, their last figures, their curves.

  python scripts/compare.py RUN RUN … [--out=compare.html]

  RUN           the folder of a run; the first is what the others are measured against
  --out=FILE    also writes a page with the curves over each other, by step and by time
"""

OUT = flags.DEFINE_string('out', None, 'where the page is written')


def main(arguments: list[str]) -> None:
  """Runs the script.

  Args:
    arguments: folders of runs.

  Raises:
    ConfigError: fewer than two runs, or a folder without one.
  """
  if len(arguments) < 2:
    raise ConfigError(
      f'found {len(arguments)} run(s), expected two or more; '
      'for example scripts/compare.py runs/first runs/second'
    )

  from deepseek_jax.train.compare_page import compare_page, compare_text, read_runs

  runs = read_runs([pathlib.Path(argument) for argument in arguments])
  print(compare_text(runs))
  if OUT.value:
    path = pathlib.Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(compare_page(runs), encoding='utf-8')
    print(f'\n{path}')


if __name__ == '__main__':
  launch.run_with_arguments(main, USAGE)
