"""What the configs give today is what the files beside this one say."""

import pathlib

import pytest

from scripts import update_golden

CURVES = ('curves/tiny_mla.txt',)
"""Curves that are made every time: a whole training step is compiled for each."""
PATHS = [
  pytest.param(
    path,
    marks=[pytest.mark.slow]
    if path.startswith(('curves/', 'trainings/')) and path not in CURVES
    else [],
  )
  for path in sorted(update_golden.files(pathlib.Path()))
]


@pytest.mark.parametrize('path', PATHS)
def test_golden(path, cache_dir):
  """A difference is shown with the command that updates the file."""
  fault = update_golden.compare(path, update_golden.files(cache_dir)[path]())
  assert not fault, fault


def test_no_file_is_left_over():
  """A golden file that nothing makes any more would be compared with nothing."""
  made = set(update_golden.files(pathlib.Path()))
  there = {
    file.relative_to(update_golden.FOLDER).as_posix()
    for file in update_golden.FOLDER.glob('*/*.txt')
  }
  assert there == made


def test_differences_are_seen(tmp_path, monkeypatch):
  """A missing file, another line and a loss beyond the tolerance all name the command."""
  monkeypatch.setattr(update_golden, 'FOLDER', tmp_path)
  command = 'python scripts/update_golden.py --write'
  assert command in update_golden.compare('shardings/a.txt', 'x\n')
  (tmp_path / 'shardings').mkdir()
  (tmp_path / 'shardings/a.txt').write_text('one\ntwo\n')
  assert not update_golden.compare('shardings/a.txt', 'one\ntwo\n')
  fault = update_golden.compare('shardings/a.txt', 'one\nthree\n')
  assert '-two\n+three\n' in fault
  assert command in fault
  fault = update_golden.compare('shardings/a.txt', 'line\n' * 1000)
  assert 'more lines' in fault
  assert len(fault.splitlines()) < 100
  (tmp_path / 'curves').mkdir()
  (tmp_path / 'curves/a.txt').write_text('step loss\n0 5.5\n1 5.0\n')
  assert not update_golden.compare('curves/a.txt', 'step loss\n0 5.5001\n1 5.0\n')
  for wrong in (
    'step loss\n0 5.51\n1 5.0\n',
    'step loss\n0 5.5\n',
    'step nats\n0 5.5\n1 5.0\n',
    'step loss\n0 nan\n1 5.0\n',
  ):
    assert command in update_golden.compare('curves/a.txt', wrong)
