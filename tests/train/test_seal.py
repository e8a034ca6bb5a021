"""Every kind of damage to a checkpoint is noticed, also what Orbax reads without a word."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.train import seal
from deepseek_jax.train.checkpoint import Checkpoints, restore_params
from deepseek_jax.train.checkpoint_reader import read_params, whole_step

WEIGHTS = jax.random.normal(jax.random.key(0), (64, 64))


@pytest.fixture(scope='module')
def saved(tmp_path_factory) -> pathlib.Path:
  """Checkpoints of steps 1 and 2."""
  path = tmp_path_factory.mktemp('saved')
  with Checkpoints(path) as checkpoints:
    for step in (1, 2):
      state = {'params': {'w': WEIGHTS * step}, 'buffers': {}}
      checkpoints.save(step, state, {'step': step}, {'name': 'x'}, {'loss': 1.0})
  return path


@pytest.fixture
def copy(saved, tmp_path) -> pathlib.Path:
  """A copy to damage."""
  return shutil.copytree(saved, tmp_path / 'checkpoints')


def array_file(checkpoint: pathlib.Path) -> pathlib.Path:
  """The largest file: the arrays."""
  files = [path for path in checkpoint.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def flip(path: pathlib.Path, place: int, bit: int = 4) -> None:
  """Flips one bit of a file."""
  content = bytearray(path.read_bytes())
  content[place] ^= 1 << bit
  path.write_bytes(content)


def cut(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-1])


def zero(path: pathlib.Path) -> None:
  path.write_bytes(bytes(path.stat().st_size))


def test_a_whole_checkpoint_has_no_damage(saved):
  assert whole_step(saved, None) == 2
  for step in (1, 2):
    assert seal.find_damage(saved / str(step)) is None
    for part in seal.PARTS:
      assert json.loads((saved / str(step) / part / seal.SEAL).read_text())['files']


def test_orbax_alone_reads_a_flipped_bit_as_a_weight(copy):
  """Why there are seals; where this fails, Orbax has learned to check, and they may go."""
  flip(array_file(copy / '2'), 9000)
  params, _, _ = read_params(copy / '2')
  assert np.count_nonzero(params['w'] != 2 * WEIGHTS) == 1


@pytest.mark.parametrize('share', [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize('bit', [0, 7])
def test_one_flipped_bit_anywhere_in_the_arrays(copy, share, bit):
  path = array_file(copy / '2')
  flip(path, round(share * (path.stat().st_size - 1)), bit)
  assert 'has other content than was written' in (seal.find_damage(copy / '2') or '')


def test_damage_to_every_single_file(saved, tmp_path):
  """Whatever file is cut, zeroed, removed or changed: the checkpoint before it is used."""
  names = [path.relative_to(saved / '2') for path in (saved / '2').rglob('*') if path.is_file()]
  # Orbax marks each part as finished with a file that it does not read for local folders.
  names = [name for name in names if name.name != 'commit_success.txt']
  assert len(names) >= 12
  for number, name in enumerate(sorted(names)):
    damages = [cut, zero, pathlib.Path.unlink]
    if name.parts[0] in seal.PARTS:
      damages.append(lambda path: flip(path, path.stat().st_size // 2))
    for kind, damage in enumerate(damages):
      if (name.parts[0], damage) == ('metrics', pathlib.Path.unlink):
        continue
      folder = shutil.copytree(saved, tmp_path / f'{number}-{kind}')
      damage(folder / '2' / name)
      assert seal.find_damage(folder / '2') is not None, (name, damage)
      assert whole_step(folder, None) == 1


def test_a_part_or_all_but_the_name_is_gone(copy):
  (copy / '2' / 'config' / seal.SEAL).unlink()
  assert seal.find_damage(copy / '2') == 'config/seal.json is missing'
  shutil.rmtree(copy / '2' / 'config')
  assert seal.find_damage(copy / '2') == 'config/data.json is missing'
  shutil.rmtree(copy / '2' / 'state')
  assert seal.find_damage(copy / '2') == 'state/_METADATA is missing'
  shutil.rmtree(copy / '2')
  (copy / '2').mkdir()
  assert seal.find_damage(copy / '2') == '_CHECKPOINT_METADATA is missing'


def test_broken_json(copy):
  (copy / '2' / 'metrics' / 'metrics').write_text('{"loss": ')
  assert seal.find_damage(copy / '2') == 'metrics/metrics is not JSON'
  (copy / '2' / '_CHECKPOINT_METADATA').write_bytes(b'\xff')
  assert seal.find_damage(copy / '2') == '_CHECKPOINT_METADATA is not JSON'
  (copy / '1' / 'config' / seal.SEAL).write_text('[]')
  assert seal.find_damage(copy / '1') == 'config/seal.json is damaged'


def test_a_checkpoint_without_seals_is_looked_at_as_far_as_possible(copy):
  """As they were before there were seals."""
  for part in seal.PARTS:
    (copy / '2' / part / seal.SEAL).unlink()
  assert seal.find_damage(copy / '2') is None
  (copy / '2' / 'config' / 'data.json').write_text('{')
  assert seal.find_damage(copy / '2') == 'config/data.json is not JSON'


def test_readers_use_the_newest_whole_one_and_say_so(copy, capfd):
  before = sorted(copy.iterdir())
  cut(array_file(copy / '2'))
  np.testing.assert_array_equal(restore_params(copy)[0]['w'], WEIGHTS)
  error = capfd.readouterr().err
  assert f'{copy / "2"}: the checkpoint is damaged: state/' in error
  assert 'using the checkpoint of step 1' in error
  assert sorted(copy.iterdir()) == before, 'reading changes nothing'
  with pytest.raises(ConfigError, match=r'2: the checkpoint is damaged: state/.* bytes, expected'):
    restore_params(copy, 2)


def test_all_damaged_is_an_error_that_lists_them(copy):
  cut(array_file(copy / '1'))
  cut(array_file(copy / '2'))
  with pytest.raises(ConfigError) as caught:
    restore_params(copy)
  first, second, last = caught.value.messages
  assert '/2: the checkpoint is damaged' in first
  assert '/1: the checkpoint is damaged' in second
  assert 'no other checkpoint is left' in last


def test_a_file_that_may_not_be_read_is_not_damage(copy, monkeypatch):
  def refuse(*_, **__):
    raise PermissionError(13, 'Permission denied', 'w')

  monkeypatch.setattr(seal, '_measure', refuse)
  with pytest.raises(ConfigError, match='w: Permission denied'):
    seal.find_damage(copy / '2')


def test_a_disk_that_fails_to_read_is_damage(copy, monkeypatch):
  def fail(*_, **__):
    raise OSError(5, 'Input/output error', 'w')

  monkeypatch.setattr(seal, '_measure', fail)
  assert seal.find_damage(copy / '2') == 'w: Input/output error'
