"""plan_pipeline.py from its command line, in this process, on costs of an earlier call."""

import dataclasses
import json

import pytest

from configs import tiny_mla
from deepseek_jax.pods.schedule.plan import Cost
from deepseek_jax.pods.schedule.units import model_units

COST = Cost(forward=0.01, backward_input=0.01, backward_weight=0.01, backward=0.02, kept_bytes=1e6)


@pytest.fixture
def costs(tmp_path):
  """A file of costs for the units of tiny_mla."""
  names = [unit.name for unit in model_units(tiny_mla.get_config())]
  record = {'unit': 'seconds', 'rows': 2, 'names': names}
  record['costs'] = [dataclasses.asdict(COST) for _ in names]
  path = tmp_path / 'costs.json'
  path.write_text(json.dumps(record))
  return path


def test_schedules_are_compared(run_script, costs, tmp_path):
  given = ['--config=tiny_mla', f'--costs={costs}', f'--output={tmp_path / "out"}']
  ended = run_script('plan_pipeline', *given, '--stages=2', '--microbatches=4')
  assert (ended.code, ended.errors) == (0, '')
  lines = ended.output.splitlines()
  assert any(line.startswith('ZeroBubbleH1()') for line in lines)
  assert any(line.startswith('left out: found 5 units') for line in lines)
  assert lines[-1].startswith('recommended: ')
  assert (tmp_path / 'out' / 'timeline.svg').is_file()
  assert json.loads((tmp_path / 'out' / 'costs.json').read_text())['rows'] == 2
  kinds = '--schedule=Interleaved(chunks_per_stage=2); OneFOneB()'
  ended = run_script('plan_pipeline', *given, '--stages=2', '--microbatches=4', kinds)
  assert ended.code == 0
  assert 'GPipe' not in ended.output


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], '--config, --stages or --microbatches is missing'),
    (['--config=tiny_mla', '--stages=2'], 'is missing'),
    (['--config=tiny_mla', '--stages=0', '--microbatches=2'], 'stages'),
    (['--config=nowhere', '--stages=2', '--microbatches=2'], 'nowhere'),
    (['--schedule=DuolPipe()'], 'DualPipe'),
    (['--schedule=DualPipe()'], 'expected an even number, 4 or more'),
    (['--costs=nowhere.json'], 'expected measured, counted'),
    (['--config.model.depth=4'], 'has 5 units, the model 6 others'),
    (['--memory_gib=0.000001'], 'no synchronous schedule fits'),
    (['--microbatches=2', '--stages=9'], '5 units to cut'),
  ],
)
def test_bad_input_is_one_message(run_script, costs, tmp_path, arguments, message):
  if arguments and not any(word.startswith('--config=') for word in arguments):
    usual = ['--config=tiny_mla', f'--costs={costs}', f'--output={tmp_path / "out"}']
    arguments = [*usual, '--stages=2', '--microbatches=2', *arguments]
  ended = run_script('plan_pipeline', *arguments)
  assert ended.code == 2
  assert message in ended.errors
  assert 'Traceback' not in ended.errors
