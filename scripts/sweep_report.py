"""Concludes a sweep: results.json, and from it the table, the pictures and the page."""

import pathlib
from typing import Any

from absl import flags

from deepseek_jax.core.config import ConfigError
from scripts import launch

USAGE = """
Says what a sweep found, finished or going on.

  python scripts/sweep_report.py --sweep=DIR [--out=experiments/<question>]
  python scripts/sweep_report.py --results=experiments/<question>/results.json

  --sweep=DIR      folder of a sweep: its runs are read into results.json
  --results=FILE   nothing is read but this file, as it was committed
  --out=DIR        for results.json, table.md, report.html and pictures as SVG and PNG
                   (default: beside what is read)
  --figure=NAME    the figure of the table (default: bits_per_byte where all runs have it)
  --readme         also fills the tables of README.md there: see deepseek_jax/lab/write_up.py

Prints the table in Markdown.
"""

SWEEP = flags.DEFINE_string('sweep', None, 'folder of the sweep')
RESULTS = flags.DEFINE_string('results', None, 'file of committed results')
OUT = flags.DEFINE_string('out', None, 'folder for what is written')
README = flags.DEFINE_bool('readme', False, 'fill the tables of README.md')
FIGURE = flags.DEFINE_string('figure', None, 'figure of the table')


def main() -> None:
  """Runs the script."""
  if (SWEEP.value is None) == (RESULTS.value is None):
    raise ConfigError(
      'expected either --sweep or --results; for example --sweep=runs/balance_kinds'
    )

  from deepseek_jax.core.config import did_you_mean
  from deepseek_jax.lab.results import NAME, collect, read_results, write_results
  from deepseek_jax.lab.sweep_page import sweep_page
  from deepseek_jax.lab.sweep_pictures import write_pictures
  from deepseek_jax.lab.verdict import FIGURES, markdown

  if FIGURE.value is not None and FIGURE.value not in FIGURES:
    near = did_you_mean(FIGURE.value, FIGURES)
    raise ConfigError(f'--figure {FIGURE.value}: no such figure{near}; known: {", ".join(FIGURES)}')
  if RESULTS.value is not None:
    source = pathlib.Path(RESULTS.value)
    results, folder = read_results(source), source.parent
  else:
    folder = pathlib.Path(str(SWEEP.value))
    results = collect(folder)
  out = pathlib.Path(OUT.value) if OUT.value else folder
  out.mkdir(parents=True, exist_ok=True)
  if RESULTS.value is None:
    write_results(out / NAME, results)
  text = markdown(results, FIGURE.value)
  (out / 'table.md').write_text(text, encoding='utf-8')
  (out / 'report.html').write_text(sweep_page(results), encoding='utf-8')
  files = write_pictures(out, results)
  written = [out / 'report.html', out / 'table.md', *files]
  if README.value:
    written.append(fill_readme(out / 'README.md', results))
  print(text)
  print('\n'.join(map(str, written)))


def fill_readme(path: pathlib.Path, results: Any) -> pathlib.Path:
  """Writes the tables of a write-up anew; returns the file."""
  from deepseek_jax.lab.write_up import fill

  try:
    text = fill(path.read_text(encoding='utf-8'), results)
  except OSError as error:
    raise ConfigError(f'{path}: {error.strerror}') from error
  except ConfigError as error:
    raise ConfigError(f'{path}: {message}' for message in error.messages) from error
  path.write_text(text, encoding='utf-8')
  return path


if __name__ == '__main__':
  launch.run(main, USAGE)
