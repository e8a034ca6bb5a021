"""A run goes on at its newest whole checkpoint; damaged ones are kept beside it."""

import pathlib
import shutil

import jax.numpy as jnp
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.display import QuietDisplay
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.recover import recover
from deepseek_jax.train.workdir import Workdir


class Heard(QuietDisplay):
  """Remembers what it was told."""

  def __init__(self):
    self.texts: list[str] = []

  def message(self, text):
    self.texts.append(text)


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> pathlib.Path:
  """A folder with checkpoints of steps 4, 8 and 12."""
  path = tmp_path_factory.mktemp('run')
  with Checkpoints(path / 'checkpoints') as checkpoints:
    for step in (4, 8, 12):
      checkpoints.save(step, {'params': jnp.full((9,), step)}, {'step': step}, {}, {'loss': 1.0})
  return path


@pytest.fixture
def workdir(saved, tmp_path) -> Workdir:
  """A copy to damage."""
  return Workdir(shutil.copytree(saved, tmp_path / 'run'))


def names(workdir: Workdir) -> list[str]:
  return sorted(path.name for path in workdir.checkpoints.iterdir())


def damage(workdir: Workdir, step: int) -> None:
  (workdir.checkpoints / str(step) / 'config' / 'data.json').write_text('{"a"')


def test_nothing_saved_is_step_zero(tmp_path):
  assert recover(Workdir(tmp_path), QuietDisplay()) == 0
  assert not list(tmp_path.iterdir())


def test_a_whole_run_is_left_alone(workdir):
  display = Heard()
  assert recover(workdir, display) == 12
  assert (display.texts, workdir.faults.exists()) == ([], False)
  assert names(workdir) == ['12', '4', '8']


def test_damaged_ones_are_set_aside_and_written_down(workdir):
  damage(workdir, 12)
  shutil.rmtree(workdir.checkpoints / '8' / 'state')
  display = Heard()
  assert recover(workdir, display) == 4
  assert names(workdir) == ['12.damaged', '4', '8.damaged']
  rows = JsonLines(workdir.faults).read()
  assert [(row['step'], row['kind']) for row in rows] == [(4, 'damaged_checkpoint')] * 2
  assert [row['message'] for row in rows] == display.texts
  assert 'checkpoint 12 is damaged (config/data.json is not JSON)' in display.texts[0]
  assert 'kept as 12.damaged; going on after step 4' in display.texts[0]
  # The folder takes the same steps again, and a second accident too.
  with Checkpoints(workdir.checkpoints) as checkpoints:
    checkpoints.save(8, {'params': jnp.zeros(9)}, {'step': 8}, {})
  damage(workdir, 8)
  assert recover(workdir, QuietDisplay()) == 4
  assert names(workdir) == ['12.damaged', '4', '8.damaged', '8.damaged.2']


@pytest.mark.parametrize('name', ['metrics/metrics', '_CHECKPOINT_METADATA', 'config/data.json'])
def test_an_older_damaged_one_does_not_stop_the_run(workdir, name):
  (workdir.checkpoints / '4' / name).write_text('{"a"')
  assert recover(workdir, QuietDisplay()) == 12
  with Checkpoints(workdir.checkpoints, best_metric='loss') as checkpoints:
    checkpoints.save(16, {'params': jnp.zeros(9)}, {'step': 16}, {}, {'loss': 9.0})
  assert names(workdir) == ['12', '16', '4.damaged', '8']


def test_all_damaged_is_an_error_and_changes_nothing(workdir):
  for step in (4, 8, 12):
    damage(workdir, step)
  with pytest.raises(ConfigError) as caught:
    recover(workdir, QuietDisplay())
  assert [message.split(':')[0].rsplit('/')[-1] for message in caught.value.messages[:3]] == [
    '12', '8', '4',
  ]  # fmt: skip
  assert 'nothing was changed' in caught.value.messages[3]
  assert names(workdir) == ['12', '4', '8']
  assert not workdir.faults.exists()
