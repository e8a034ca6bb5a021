"""An experiment finds what does not fit together before anything is compiled, all of it at once."""

import dataclasses

import pytest

from configs import tiny_caption, tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.precision import BFloat16, Fastest, Float32
from deepseek_jax.optim.balance import SignBias
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT, POD
from deepseek_jax.train.experiment import Cadence, resolved
from deepseek_jax.train.objective import NextToken
from deepseek_jax.train.step import build_program


@pytest.fixture
def run():
  """An experiment without faults on eight devices."""
  return tiny_mla.get_config()


def test_nothing_is_wrong(run):
  """Good experiments have no faults; they are values that hash and compare."""
  assert run.check(8) == run.check(1) == []
  assert hash(run) == hash(dataclasses.replace(run)) != hash(dataclasses.replace(run, seed=1))


def test_own_faults_at_once(run):
  """What the experiment sees alone is listed when it is made."""
  with pytest.raises(ConfigError) as caught:
    dataclasses.replace(run, train_steps=0, microbatches=3, seed=-1)
  assert caught.value.messages == (
    '`train_steps` is 0; expected 1 or more',
    '`microbatches` is 3, which does not divide data.batch_size 8',
    f'`seed` is -1; expected 0 to {2**32 - 1}',
  )
  with pytest.raises(ConfigError, match='`microbatches` is 0; expected 1 or more'):
    dataclasses.replace(run, microbatches=0)


def test_faults_between_parts_at_once(run):
  """Every part that does not fit is listed, under its path; none hides another."""
  long = WarmupStableDecay(warmup_steps=50)
  wrong = dataclasses.replace(
    run,
    schedule=long,
    objective=NextToken(mtp_schedule=long),
    balance=SignBias(schedule=long),
    model=dataclasses.replace(run.model, vocab=100),
    data=dataclasses.replace(run.data, batch_size=12),
  )
  errors = wrong.check(8)
  starts = ['schedule', 'objective.mtp_schedule', 'balance', 'model.vocab', 'data.batch_size']
  assert [next(s for s in starts if error.startswith(s)) for error in errors] == starts
  assert 'model.vocab is 100, fewer than the 259 tokens of data.tokenizer Bytes' in errors
  with pytest.raises(ConfigError) as caught:
    build_program(wrong)
  assert list(caught.value.messages) == errors


def test_mesh_faults(run):
  """A mesh that does not fit is said once, and what depends on it is left out."""
  wrong = dataclasses.replace(
    run,
    mesh=MeshConfig(data=3),
    data=dataclasses.replace(run.data, batch_size=5),
    model=dataclasses.replace(run.model, vocab=1),
  )
  vocab, mesh = sorted(wrong.check(8), reverse=True)
  assert mesh.startswith('mesh: the axes')
  assert vocab.startswith('model.vocab')


def test_batch_against_mesh(run):
  """Rows of each microbatch, and places of each row."""

  def errors(batch_size, length, microbatches, mesh, rules):
    data = dataclasses.replace(run.data, batch_size=batch_size, length=length)
    changed = dataclasses.replace(run, data=data, microbatches=microbatches, mesh=mesh, rules=rules)
    return changed.check(8)

  sequence = dataclasses.replace(EXPERT, seq=('seq',))
  assert errors(16, 64, 2, MeshConfig(), EXPERT) == []
  assert errors(16, 64, 4, MeshConfig(), EXPERT) == [
    'data.batch_size 16 gives 4 rows in each of 4 microbatches, not divisible by the 8 devices '
    "that share the batch (rules.batch ('replica', 'data', 'expert'))"
  ]
  assert errors(12, 64, 1, MeshConfig(data=2, model=4), EXPERT) == []
  assert errors(3, 30, 1, MeshConfig(data=2, seq=4), sequence) == [
    'data.batch_size 3 gives 3 rows, not divisible by the 2 devices that share the batch '
    "(rules.batch ('replica', 'data', 'expert'))",
    "data.length is 30, not divisible by the 4 devices that share a sequence (rules.seq ('seq',))",
  ]


def test_batch_axes_that_collide(run):
  """Rows and places of a row cannot lie on one mesh axis."""
  rules = dataclasses.replace(EXPERT, seq=('data',))
  (error,) = dataclasses.replace(run, rules=rules).check(8)
  assert error.startswith('rules: ')
  assert '`batch` and `seq` both claim mesh axis `data`' in error


def test_media_are_not_spread_over_a_row():
  """With one device along `seq` a preset of all axes is right; with two it is refused."""
  base = tiny_caption.get_config()
  assert not dataclasses.replace(base, rules=POD, mesh=MeshConfig(data=1)).check(1)
  (error,) = dataclasses.replace(base, rules=POD, mesh=MeshConfig(data=1, seq=2)).check(2)
  assert error.startswith("rules.seq ('seq',) has 2 devices that share a row; media are not spread")


def test_cadence():
  """Counts of steps are at least one; absent is absent."""
  with pytest.raises(ConfigError) as caught:
    Cadence(log=0, evaluate=-1, save=0)
  assert caught.value.messages == (
    '`log` is 0; expected 1 or more',
    '`evaluate` is -1; expected 1 or more',
    '`save` is 0; expected 1 or more',
  )
  assert Cadence(evaluate=None, save=None).save is None


def test_resolved(run):
  """A measured precision takes the place of `Fastest` and of nothing else."""
  open_ = dataclasses.replace(run, precision=Fastest())
  assert resolved(open_, BFloat16()).precision == BFloat16()
  assert resolved(run, BFloat16()).precision == Float32()
  with pytest.raises(ConfigError, match='Fastest'):
    build_program(open_)
