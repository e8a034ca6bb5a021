"""Reads every run of a sweep with a measure of one's own: what the scripts of several questions do.

Measures are kept line by line as they are made, so that what fails later loses none.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

type Row = dict[str, Any]


def main(
  parser: argparse.ArgumentParser,
  measure: Callable[[pathlib.Path, argparse.Namespace], Iterator[Row]],
  show: Callable[[list[Row], pathlib.Path], str],
  arguments: list[str] | None = None,
) -> None:
  """Makes rows.jsonl of a sweep's runs, or reads an earlier one, and shows it.

  Args:
    parser: its description, and options of `measure`; `--runs`, `--rows` and `--out` are added.
    measure: yields what it finds of one run, by the run's folder. The run's variant and seed are
      put before it.
    show: draws rows into a folder, and returns a table.
    arguments: those of the command line unless told.

  Raises:
    SystemExit: there is no run, or rows are there already that would be lost.
  """
  parser.add_argument('--runs', type=pathlib.Path, help='folder of a sweep')
  parser.add_argument('--rows', type=pathlib.Path, help='rows.jsonl of earlier')
  parser.add_argument('--out', type=pathlib.Path, help='folder; that of the runs by default')
  given = parser.parse_args(arguments)
  if (given.runs is None) == (given.rows is None):
    raise SystemExit('expected either --runs or --rows')
  out = given.out or given.runs or given.rows.parent
  if given.rows is not None:
    rows = [json.loads(line) for line in given.rows.read_text(encoding='utf-8').splitlines()]
    out.mkdir(parents=True, exist_ok=True)
  else:
    rows = _read(given, measure, out)
  print(show(rows, out))


def _read(given: argparse.Namespace, measure: Any, out: pathlib.Path) -> list[Row]:
  folders = sorted(given.runs.glob('*/seed_*'))
  if not folders:
    raise SystemExit(f'{given.runs}: no run here; run sweep.py first')
  out.mkdir(parents=True, exist_ok=True)
  if (out / 'rows.jsonl').exists():
    raise SystemExit(f'{out}/rows.jsonl: is there; show it with --rows, or choose another --out')
  rows: list[Row] = []
  for folder in folders:
    run = {'variant': folder.parent.name, 'seed': int(folder.name.removeprefix('seed_'))}
    for found in measure(folder, given):
      rows.append({**run, **found})
      line = json.dumps(rows[-1])
      with (out / 'rows.jsonl').open('a', encoding='utf-8') as file:
        file.write(f'{line}\n')
      print(line, flush=True)
  return rows
