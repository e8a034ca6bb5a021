"""A run's folder tells what runs in it, and refuses what cannot go on there."""

import dataclasses
import errno
import json
import os
import pathlib

import pytest

from configs import tiny_mla, tiny_window
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.load import load_config
from deepseek_jax.core.precision import BFloat16, Fastest, Float32
from deepseek_jax.core.serialise import to_json
from deepseek_jax.models.remat import EveryLayer, SquareRoot
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import TENSOR
from deepseek_jax.train.workdir import Workdir, compare, write_json


@pytest.fixture
def run():
  """An experiment."""
  return tiny_mla.get_config()


def test_round_trip(tmp_path, run):
  """What is written is read again, from JSON and from Python; nothing else is left behind."""
  workdir = Workdir(tmp_path / 'deep' / 'run')
  assert workdir.read() is None
  workdir.write(run)
  assert workdir.read() == run
  assert load_config(workdir.path / 'config.py') == run
  changed = dataclasses.replace(run, train_steps=7, mesh=MeshConfig(data=2, model=4), rules=TENSOR)
  workdir.write(changed)
  assert workdir.read() == changed
  assert {path.name for path in workdir.path.iterdir()} == {'config.json', 'config.py'}


def test_an_empty_folder_is_no_run_yet(tmp_path):
  """A folder that somebody made beforehand is fine."""
  assert Workdir(tmp_path).read() is None


def test_a_file_is_no_folder(tmp_path, run):
  """Neither read nor written to."""
  file = tmp_path / 'run'
  file.write_text('x')
  with pytest.raises(ConfigError, match='is a file; expected a folder'):
    Workdir(file).read()
  with pytest.raises(ConfigError, match='run: File exists'):
    Workdir(file).write(run)
  with pytest.raises(ConfigError, match='Not a directory'):
    Workdir(file / 'below').write(run)


def test_a_foreign_folder(tmp_path):
  """Somebody's photos are not overwritten."""
  (tmp_path / 'photo.jpg').touch()
  with pytest.raises(ConfigError, match=r'not empty and has no config\.json'):
    Workdir(tmp_path).read()


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'{"kind": ', r'config\.json: not JSON: '),
    (b'\xff\xfe\x00', r'config\.json: not JSON: '),
    (b'[]', r'config\.json: this is not a saved config'),
    (b'{"some": "other programme"}', r'config\.json: this is not a saved config'),
    (b'{"kind": "deepseek_jax.nowhere:Thing"}', r'config\.json: .*deepseek_jax\.nowhere:Thing'),
  ],
)
def test_broken_configs(tmp_path, content, message):
  """Every way a config.json can be broken is an error that names the file."""
  (tmp_path / 'config.json').write_bytes(content)
  with pytest.raises(ConfigError, match=message):
    Workdir(tmp_path).read()


def test_a_config_of_something_else(tmp_path, run):
  """A saved config of another kind is not a run."""
  (tmp_path / 'config.json').write_text(json.dumps(to_json(run.model)))
  with pytest.raises(ConfigError, match='expected an Experiment, found DeepSeekV3'):
    Workdir(tmp_path).read()


def test_a_folder_that_cannot_be_written(tmp_path, run, monkeypatch):
  """The system's reason is passed on."""

  def refuse(*_, **__):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

  monkeypatch.setattr(pathlib.Path, 'write_text', refuse)
  with pytest.raises(ConfigError, match='run: Permission denied'):
    Workdir(tmp_path / 'run').write(run)


def test_a_crash_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
  """A file is there whole, old or new."""
  file = tmp_path / 'a.json'
  write_json(file, {'old': 1})

  def crash(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'replace', crash)
  with pytest.raises(KeyboardInterrupt):
    write_json(file, {'new': 2})
  assert json.loads(file.read_text()) == {'old': 1}


def test_a_crash_in_the_first_write_is_no_run(tmp_path, run, monkeypatch):
  """What it leaves behind does not keep the run from beginning again."""
  workdir = Workdir(tmp_path / 'run')

  def crash(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(os, 'replace', crash)
    with pytest.raises(KeyboardInterrupt):
      workdir.write(run)
  assert any(workdir.path.iterdir())
  assert workdir.read() is None
  workdir.write(run)
  assert workdir.read() == run


def test_paths():
  """Names are part of what users rely on."""
  workdir = Workdir(pathlib.Path('w'))
  assert workdir.checkpoints == pathlib.Path('w/checkpoints')
  assert workdir.evaluations == pathlib.Path('w/evaluations.jsonl')
  assert workdir.samples == pathlib.Path('w/samples.jsonl')


def test_compare_lists_every_fatal_change(run):
  """All of them at once, with old and new value, and what to do."""
  new = dataclasses.replace(
    run,
    seed=5,
    train_steps=99,
    data=dataclasses.replace(run.data, length=48),
    model=tiny_window.get_config().model,
    optimizer=dataclasses.replace(run.optimizer, peak_lr=0.5),
  )
  with pytest.raises(ConfigError) as caught:
    compare(run, new)
  *fatal, advice = caught.value.messages
  paths = [message.split(':')[0] for message in fatal]
  assert paths == ['model.attention', 'data.length', 'optimizer.peak_lr', 'seed']
  assert fatal[1] == 'data.length: 64 → 48 — the run in this workdir cannot change that'
  assert '--workdir' in advice


def test_compare_returns_what_may_change(run):
  """More steps, another mesh, another cadence: the run goes on, and is told what changed."""
  assert compare(run, run) == []
  new = dataclasses.replace(
    run, train_steps=99, rules=TENSOR, mesh=MeshConfig(model=2), precision=BFloat16()
  )
  changes = compare(run, new)
  assert {change.path.split('.')[0] for change in changes} == {
    'train_steps', 'mesh', 'rules', 'precision',
  }  # fmt: skip


def test_remat_may_change_also_where_it_regroups_the_scans(run):
  """Checkpoints are read by canonical address."""
  deep = dataclasses.replace(run, model=dataclasses.replace(run.model, depth=9))
  for remat in (EveryLayer(), SquareRoot()):
    (change,) = compare(deep, dataclasses.replace(deep, remat=remat))
    assert change.path == 'remat'


def test_a_measured_precision_stays(run):
  """`Fastest` in the config means what was measured when the run began."""
  measured = dataclasses.replace(run, precision=BFloat16())
  assert compare(measured, dataclasses.replace(run, precision=Fastest())) == []
  (change,) = compare(measured, dataclasses.replace(run, precision=Float32()))
  assert change.path == 'precision'


def test_a_run_is_trained_once_it_logged_or_saved(tmp_path, run):
  workdir = Workdir(tmp_path / 'run')
  assert not workdir.trained
  workdir.write(run)
  (workdir.path / 'metrics.jsonl').touch()
  workdir.checkpoints.mkdir()
  assert not workdir.trained
  (workdir.checkpoints / '3').mkdir()
  assert workdir.trained
  (workdir.checkpoints / '3').rmdir()
  (workdir.path / 'metrics.jsonl').write_text('{"step": 1}\n')
  assert workdir.trained
