"""`sweep.json` and the runs' folders: written, read back, refused."""

import dataclasses
import json

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.serialise import digest
from deepseek_jax.lab.match import Matched
from deepseek_jax.lab.sweep_file import (
  Plan,
  Planned,
  Status,
  check_same,
  read_plan,
  status_of,
  trials_of,
  write_plan,
)
from deepseek_jax.train import events
from deepseek_jax.train.metrics import JsonLines


@pytest.fixture
def plan(small) -> Plan:
  deep = dataclasses.replace(small, train_steps=9)
  planned = [
    Planned(
      name=name,
      changes=('train_steps: 20 → 9',),
      values={'train_steps': '9'},
      asked=digest(experiment),
      matched=Matched(cost=1.5, asked_steps=20, steps=9),
      experiment=experiment,
    )
    for name, experiment in (('base', small), ('deep', deep))
  ]
  return Plan(
    question='depth',
    baseline='base',
    match='FlopsPerToken()',
    seeds=(0, 1),
    precision=None,
    platform='cpu',
    variants=tuple(planned),
  )


def test_a_plan_is_read_as_it_was_written(plan, tmp_path):
  folder = tmp_path / 'new' / 'sweep'
  assert read_plan(folder) is None
  write_plan(folder, plan)
  assert read_plan(folder) == plan
  before = (folder / 'sweep.json').stat().st_mtime_ns
  write_plan(folder, plan)
  assert (folder / 'sweep.json').stat().st_mtime_ns == before
  assert [path.name for path in folder.iterdir()] == ['sweep.json']


def test_every_variant_has_a_first_seed_before_a_second(plan, tmp_path):
  found = trials_of(plan, tmp_path, (0, 1))
  names = [f'{name}/seed_{seed}' for seed in (0, 1) for name in ('base', 'deep')]
  assert [trial.name for trial in found] == names
  for trial, name in zip(found, names, strict=True):
    assert trial.workdir.path == tmp_path / name
    assert trial.experiment.seed == trial.experiment.data.shuffle_seed == trial.seed
  assert found[3].experiment.train_steps == 9
  assert found[3].log == tmp_path / 'logs' / 'deep.seed_1.log'


def test_how_far_a_run_is(plan, tmp_path):
  trial = trials_of(plan, tmp_path, (0,))[0]
  path = trial.workdir.path
  assert status_of(trial) == Status('waiting', 0)
  events.record(path, 0, 'started')
  JsonLines(path / 'metrics.jsonl').append({'step': 7})
  assert status_of(trial) == Status('unfinished', 7)
  events.record(path, 8, 'failed', 'it broke')
  assert status_of(trial) == Status('failed', 8, 'it broke')
  events.record(path, 5, 'resumed')
  events.record(path, 9, 'stopped', 'SIGTERM')
  assert status_of(trial) == Status('stopped', 9, 'SIGTERM')
  events.record(path, 20, 'finished')
  assert status_of(trial) == Status('finished', 20)
  longer = dataclasses.replace(trial.experiment, train_steps=21)
  assert status_of(dataclasses.replace(trial, experiment=longer)).kind == 'unfinished'


def test_another_version_is_refused(plan, tmp_path):
  write_plan(tmp_path, dataclasses.replace(plan, version='0.0.9'))
  with pytest.raises(ConfigError, match=r'are of deepseek_jax 0.0.9, this is'):
    read_plan(tmp_path)


@pytest.mark.parametrize('text', ['{', '[]', '{"version": 3}', '{}'])
def test_what_is_no_plan_is_refused(text, tmp_path):
  (tmp_path / 'sweep.json').write_text(text)
  with pytest.raises(ConfigError, match=r'sweep.json'):
    read_plan(tmp_path)


def test_a_plan_without_its_parts_is_refused(plan, tmp_path):
  write_plan(tmp_path, plan)
  data = json.loads((tmp_path / 'sweep.json').read_text())
  del data['variants']['deep']['asked']
  (tmp_path / 'sweep.json').write_text(json.dumps(data))
  with pytest.raises(ConfigError, match='not written by a sweep'):
    read_plan(tmp_path)


def test_other_configs_are_refused_where_something_was_trained(plan, tmp_path):
  base, deep = plan.variants
  faster = dataclasses.replace(base.experiment.optimizer, peak_lr=0.5)
  other = dataclasses.replace(
    base, experiment=dataclasses.replace(base.experiment, optimizer=faster)
  )
  changed = dataclasses.replace(plan, variants=(other,))
  check_same(plan, plan, tmp_path)
  check_same(plan, changed, tmp_path)
  for trial in trials_of(plan, tmp_path, (1,)):
    JsonLines(trial.workdir.path / 'metrics.jsonl').append({'step': 1})
  check_same(plan, plan, tmp_path)
  check_same(plan, dataclasses.replace(plan, variants=(deep, base)), tmp_path)
  with pytest.raises(ConfigError) as caught:
    check_same(plan, changed, tmp_path)
  assert caught.value.messages == (
    'base: optimizer.peak_lr: 0.01 → 0.5',
    'deep: has runs here, and is no longer a variant',
    f'{tmp_path} holds runs of other configs: start in another --output',
  )
