"""What a sweep shows on a terminal."""

import io

import pytest
import rich.console

from configs import tiny_mla
from deepseek_jax.lab.sweep_file import Status, Trial
from deepseek_jax.train import events
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.workdir import Workdir
from scripts.side_by_side import last_line, split_cores
from scripts.sweep_display import SweepLines, SweepTable


@pytest.fixture
def trials(tmp_path) -> list[Trial]:
  """Two variants of two seeds; the first run is finished."""
  found = [
    Trial(name, seed, tiny_mla.get_config(), Workdir(tmp_path / name / f'seed_{seed}'))
    for name in ('base', 'wide')
    for seed in (0, 1)
  ]
  finish(found[0], 2.25)
  return found


def finish(trial: Trial, bits: float | None) -> None:
  """Writes what a finished run leaves."""
  events.record(trial.workdir.path, 20, 'finished')
  JsonLines(trial.workdir.evaluations).append({'step': 20, 'bits_per_byte': bits})


def test_the_table_has_a_row_a_variant(trials):
  screen = io.StringIO()
  table = SweepTable(trials, rich.console.Console(file=screen, force_terminal=True, width=120))
  table.started(trials[2])
  table.started(trials[3])
  JsonLines(trials[3].workdir.path / 'metrics.jsonl').append({'step': 5, 'loss': None})
  table.refresh()
  text = screen.getvalue()
  for words in ('1/2', '0/2', '2.2500', 'seed 0: compiling', 'seed 1: 5/20, loss nan'):
    assert words in text, words
  table.ended(trials[3], Status('failed', 5, 'it broke'), 3.0)
  finish(trials[2], None)
  table.ended(trials[2], Status('finished', 20), 61.0)
  table.close()
  text = screen.getvalue()
  assert 'FAILED  wide/seed_1  step 5/20: it broke; see' in text
  assert 'done    wide/seed_0  bits/byte nan  1 min 01 s' in text
  # The last table counts both.
  last = [line for line in text.splitlines() if 'wide' in line][-1]
  assert '1/2' in last
  assert 'seed' not in last


def test_lines_count_what_is_finished(trials, capsys):
  lines = SweepLines(4, 1)
  lines.started(trials[1])
  finish(trials[1], 2.0)
  lines.ended(trials[1], Status('finished', 20), 3.0)
  lines.ended(trials[1], Status('finished', 20, 'exit code 9'), 3.0)
  lines.ended(trials[2], Status('stopped', 7, 'SIGTERM'), 3.0)
  assert capsys.readouterr().out.splitlines() == [
    'start   base/seed_1',
    'done    base/seed_1  bits/byte 2.0000  3.0 s  [2/4]',
    f'done    base/seed_1  bits/byte 2.0000  (exit code 9; see {trials[1].log})  3.0 s  [3/4]',
    'stopped wide/seed_0  step 7/20  3.0 s  [3/4]',
  ]


def test_cores_are_dealt_out(monkeypatch):
  monkeypatch.setattr('os.sched_getaffinity', lambda pid: {0, 1, 2, 3, 4}, raising=False)
  assert split_cores(1) == [None]
  assert split_cores(2) == [frozenset({0, 2, 4}), frozenset({1, 3})]
  assert split_cores(6) == [None] * 6


def test_the_last_line_is_the_last_that_says_something(tmp_path):
  (tmp_path / 'log').write_bytes(b'one\ntw\xffo\n\n  \n')
  assert last_line(tmp_path / 'log') == 'tw\ufffdo'
  (tmp_path / 'log').write_bytes(b'')
  assert last_line(tmp_path / 'log') == ''
