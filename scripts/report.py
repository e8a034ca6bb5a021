"""Draws the report of a run: one page that shows all of it, also while the run is going on."""

import pathlib

from absl import flags

from deepseek_jax.core.config import ConfigError
from scripts import launch

USAGE = """
Draws the report of a run: finished, going on, stopped or killed.

  python scripts/report.py --workdir=runs/first [--config=configs/quickstart.py]

  --workdir=DIR    the folder of a run
  --config=FILE    the config file the run began from, to say what it changed
                   (default: the one in configs/ that has the run's name)

Writes report.html into the folder: one file that loads nothing, for screen, phone and paper.
"""

WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run')


def main(config_path: str | None, assignments: dict[str, str]) -> None:
  """Runs the script."""
  if assignments:
    raise ConfigError(f'--config.{next(iter(assignments))}: a report changes nothing')
  if WORKDIR.value is None:
    raise ConfigError('--workdir is missing; for example --workdir=runs/first')

  from deepseek_jax.train.history import read_history
  from deepseek_jax.train.report_page import write_report

  workdir = pathlib.Path(WORKDIR.value)
  named = launch.named_config(read_history(workdir).name, config_path)
  print(write_report(workdir, named))


if __name__ == '__main__':
  launch.run_with_config(main, USAGE)
