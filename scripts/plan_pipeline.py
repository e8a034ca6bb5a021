"""Compares pipeline schedules for a config, and says where to cut its layers."""

import dataclasses
import json
import pathlib
from typing import Any

from absl import flags

from deepseek_jax.core.config import ConfigError
from scripts import launch

USAGE = """
Compares pipeline schedules for a config, and says where to cut its layers.

  python scripts/plan_pipeline.py --config=FILE --stages=8 --microbatches=16 [--config.path=value] …

  --config=FILE          a config file, or the name of one in configs/
  --config.path=value    changes one part
  --stages=N             devices in a row
  --microbatches=N       of one step
  --rows=N               rows of a microbatch (default: the config's rows of a step, shared out)
  --schedule=all         or kinds such as 'OneFOneB(); Interleaved(chunks_per_stage=4)'
  --costs=HOW            measured: times every layer here; counted: counts FLOPs;
                         FILE: costs that an earlier call wrote
                         (default: measured up to 300 million parameters, else counted)
  --exchange=SHARE       counted costs: how long tokens travel to experts and back, as a share of a
                         layer's forward FLOPs (default: 0; DeepSeek-V3 reports about 1)
  --transfer=TIME        from the end of work on one device until the next has it, in the unit of
                         the costs (default: 0)
  --memory_gib=N         what a device has for weights and activations (default: no limit)
  --output=FOLDER        for costs.json and timeline.svg (default: runs/pipeline)

Prints, for each schedule: time of a step; bubble, the share of all devices' time spent waiting;
the same by stage, and where the optimizer sets no barrier; share of time spent computing; spread of
the stages' work; the most microbatches, and bytes of activations, that a device remembers. Then the
cut of the schedule that it recommends. Weights are whole: no device shares them but by stage.
"""

STAGES = flags.DEFINE_integer('stages', None, 'devices', lower_bound=1)
MICROBATCHES = flags.DEFINE_integer('microbatches', None, 'of one step', lower_bound=1)
ROWS = flags.DEFINE_integer('rows', None, 'rows of a microbatch', lower_bound=1)
SCHEDULE = flags.DEFINE_string('schedule', 'all', 'kinds of schedules')
COSTS = flags.DEFINE_string('costs', None, 'measured, counted, or a file')
EXCHANGE = flags.DEFINE_float('exchange', 0.0, 'share of forward', lower_bound=0.0)
TRANSFER = flags.DEFINE_float('transfer', 0.0, 'between devices', lower_bound=0.0)
MEMORY = flags.DEFINE_float('memory_gib', None, 'of a device', lower_bound=0.0)
OUTPUT = flags.DEFINE_string('output', 'runs/pipeline', 'folder')
MEASURED_PARAMETERS = 300_000_000


def main(config_path: str | None, assignments: dict[str, str]) -> None:
  """Runs the script.

  Args:
    config_path: as `--config` takes it.
    assignments: overrides.

  Raises:
    ConfigError: a flag is missing or does not fit.
  """
  stages, microbatches = STAGES.value, MICROBATCHES.value
  if config_path is None or stages is None or microbatches is None:
    raise ConfigError(
      '--config, --stages or --microbatches is missing; for example --config=quickstart '
      '--stages=4 --microbatches=8'
    )
  from deepseek_jax.pods.schedule import compare

  schedules = choose_schedules(SCHEDULE.value)
  experiment = load(config_path, assignments)
  names, costs, unit = unit_costs(experiment, microbatches)
  outcomes, left_out = [], []
  for schedule in schedules:
    try:
      outcomes.append(compare.try_schedule(schedule, costs, stages, microbatches, TRANSFER.value))
    except ConfigError as error:
      if SCHEDULE.value != 'all':
        raise
      left_out += [f'left out: {message}' for message in error.messages]
  if not outcomes:
    raise ConfigError(left_out)
  print(f'\n{compare.outcome_table(outcomes, unit)}')
  print(''.join(f'{line}\n' for line in left_out))
  limit = None if MEMORY.value is None else MEMORY.value * 2**30
  name, reason = compare.recommend(outcomes, limit)
  best = next(outcome for outcome in outcomes if outcome.name == name)
  print(f'{name}\n{compare.describe_stages(best, names)}\n')
  print(
    f'chunks: {best.cut.spread:.1%} from the cheapest to the dearest; the dearest is '
    f'{best.cut.excess:.1%} above the mean, and no cut of whole layers can have less than '
    f'{best.cut.bound / best.cut.mean - 1:.1%}\n'
  )
  print(f'{compare.draw_text(best.timeline)}\n')
  draw(outcomes, unit)
  print(f'recommended: {name}: {reason}')


def choose_schedules(text: str) -> tuple[Any, ...]:
  """Reads kinds such as 'GPipe(); Interleaved(chunks_per_stage=4)'; 'all' is every one.

  Raises:
    ConfigError: there is no such kind.
  """
  from deepseek_jax.core.override import override_from_text
  from deepseek_jax.pods.schedule.compare import EVERY, Choice

  if text == 'all':
    return EVERY
  parts = [part.strip() for part in text.split(';') if part.strip()]
  return tuple(override_from_text(Choice(), {'schedule': part})[0].schedule for part in parts)


def load(config_path: str, assignments: dict[str, str]) -> Any:
  """Returns the run with its overrides; a precision that is to be measured is float32."""
  from deepseek_jax.core.override import override_from_text
  from deepseek_jax.core.precision import Float32
  from deepseek_jax.train.experiment import resolved

  experiment, _ = override_from_text(launch.load_experiment(config_path), assignments)
  return resolved(experiment, Float32())


def unit_costs(experiment: Any, microbatches: int) -> tuple[list[str], list[Any], str]:
  """Returns names and costs of the model's units, and the unit of time; writes costs.json."""
  import jax

  from deepseek_jax.core.tree import count
  from deepseek_jax.pods.schedule import measure
  from deepseek_jax.pods.schedule.plan import Cost
  from deepseek_jax.pods.schedule.units import model_units

  how = COSTS.value
  names = [unit.name for unit in model_units(experiment)]
  rows = ROWS.value or max(1, experiment.data.batch_size // microbatches)
  if how is None:
    size = count(jax.eval_shape(lambda: measure.init_canonical(experiment))[0])
    how = 'measured' if size <= MEASURED_PARAMETERS else 'counted'
  if how == 'measured':
    print(f'timing {len(names)} units with microbatches of {rows} rows …', flush=True)
    costs, unit = measure.measure_costs(experiment, rows), 'seconds'
  elif how == 'counted':
    costs, unit = measure.count_costs(experiment, rows, EXCHANGE.value), 'FLOPs'
  else:
    record = read_costs(pathlib.Path(how), names)
    costs, unit = [Cost(**row) for row in record['costs']], record['unit']
    rows = record['rows']
  print(f'{experiment.name}: {how} costs, in {unit}, of microbatches of {rows} rows')
  folder = pathlib.Path(OUTPUT.value)
  folder.mkdir(parents=True, exist_ok=True)
  record = {
    'config': experiment.name,
    'unit': unit,
    'rows': rows,
    'length': experiment.data.length,
    'names': names,
    'costs': [dataclasses.asdict(cost) for cost in costs],
  }
  (folder / 'costs.json').write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
  return names, costs, unit


def read_costs(path: pathlib.Path, names: list[str]) -> dict[str, Any]:
  """Reads what an earlier call wrote for the same units.

  Raises:
    ConfigError: it cannot be read, or is of another model.
  """
  try:
    record = json.loads(path.read_text(encoding='utf-8'))
    found = record['names']
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ConfigError(
      f'--costs={path}: expected measured, counted, or a costs.json of this script; found '
      f'{type(error).__name__}'
    ) from error
  if found != names:
    raise ConfigError(f'--costs={path}: has {len(found)} units, the model {len(names)} others')
  return record


def draw(outcomes: list[Any], unit: str) -> None:
  """Writes the timelines of all schedules as one picture; one without barriers is left out."""
  from deepseek_jax.lab.timeline import draw_timelines

  folder = pathlib.Path(OUTPUT.value)
  timelines = {one.name: one.timeline for one in outcomes if one.synchronous}
  timelines = timelines or {one.name: one.timeline for one in outcomes}
  draw_timelines(timelines, unit).savefig(folder / 'timeline.svg')
  print(f'timelines: {folder / "timeline.svg"}')


if __name__ == '__main__':
  launch.run_with_config(main, USAGE)
