"""Says what a run would be on a pod that is not here: memory, work, traffic and time of a step."""

import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from scripts import launch

USAGE = """
Compiles the whole training step for a slice of TPUs that is not here, on this CPU, and says what
one device would hold and do, how long a step would take, and whether it fits.

  python scripts/plan_pod.py --config=configs/v3_671b.py --topology=v5p:8x8x8 \\
      [--config.path=value] … [--out=FOLDER]

  --config=FILE           a config file, or the name of one in configs/
  --config.path=value     changes one part
  --topology=NAME         chips of a slice: v5p:8x8x8 (512 chips), v6e:8x8, tpu7x:4x4x4, v5e:16x16
  --decode_rows=N         plans a decoding step of N rows instead, one token each
  --decode_slots=4096     tokens that their cache holds
  --roughly               estimates without compiling; needs no libtpu
  --search=N              tries meshes × remat × microbatches × rules × formats of the optimizer,
                          roughly, compiles the best N of each topology (several, with commas), and
                          writes plans and configs to --out; the same command goes on after a kill
  --out=FOLDER            writes <name>.json and <name>.txt there
  --name=NAME             of these files; the experiment's is used otherwise
  --rows=12               of the longer tables

The compiler comes with: pip install "deepseek_jax[pods]"
"""

TOPOLOGY = flags.DEFINE_string('topology', None, 'chips of a slice, such as v5p:8x8x8')
DECODE_ROWS = flags.DEFINE_integer('decode_rows', None, 'rows of a decoding step')
DECODE_SLOTS = flags.DEFINE_integer('decode_slots', 4096, 'tokens that a cache holds')
ROUGHLY = flags.DEFINE_boolean('roughly', False, 'estimates without compiling')
SEARCH = flags.DEFINE_integer('search', None, 'layouts to compile', lower_bound=0)
OUT = flags.DEFINE_string('out', None, 'folder for the plan')
NAME = flags.DEFINE_string('name', None, 'of the files')
ROWS = flags.DEFINE_integer('rows', 12, 'of the longer tables')


def main(config_path: str | None, assignments: dict[str, str]) -> int:
  """Runs the script."""
  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.core.override import override_from_text
  from deepseek_jax.core.precision import BFloat16
  from deepseek_jax.pods.topology import parse_topology, prepare
  from deepseek_jax.train.experiment import resolved

  if config_path is None:
    raise ConfigError('--config is missing; for example --config=configs/v3_671b.py')
  if TOPOLOGY.value is None:
    raise ConfigError('--topology is missing; for example --topology=v5p:8x8x8')
  topologies = [parse_topology(name) for name in TOPOLOGY.value.split(',')]
  if len(topologies) > 1 and SEARCH.value is None:
    raise ConfigError('--topology has several slices; only --search compares them')
  if ROUGHLY.value or SEARCH.value == 0:
    os.environ['JAX_PLATFORMS'] = 'cpu'
  else:
    prepare(os.environ)
  experiment, changes = override_from_text(launch.load_experiment(config_path), assignments)
  experiment = resolved(experiment, BFloat16())
  for change in changes:
    print(f'changed  {change}')
  if SEARCH.value is not None:
    search(experiment, topologies)
  elif ROUGHLY.value:
    from deepseek_jax.pods.analytic import estimate_roughly, rough_machine
    from deepseek_jax.pods.report import describe_rough

    rough = estimate_roughly(experiment, rough_machine(experiment, topologies[0]))
    print(describe_rough(rough, topologies[0]))
  else:
    plan_one(experiment, topologies[0])
  return 0


def plan_one(experiment: Any, topology: Any) -> None:
  """Compiles the run as it is, and prints and keeps its plan."""
  from deepseek_jax.pods.decoding import plan_decoding
  from deepseek_jax.pods.plan import to_json
  from deepseek_jax.pods.report import describe
  from deepseek_jax.pods.topology import find_devices
  from deepseek_jax.pods.training import plan_training

  command = shlex.join(['python', 'scripts/plan_pod.py', *sys.argv[1:]])
  devices = find_devices(topology)
  if DECODE_ROWS.value is None:
    plan = plan_training(experiment, topology, devices, command)
  else:
    rows, slots = DECODE_ROWS.value, DECODE_SLOTS.value
    plan = plan_decoding(experiment, topology, devices, rows, slots, command)
  text = describe(plan, ROWS.value)
  if OUT.value is not None:
    folder = pathlib.Path(OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    name = NAME.value or plan.name
    (folder / f'{name}.json').write_text(to_json(plan), encoding='utf-8')
    (folder / f'{name}.txt').write_text(text + '\n', encoding='utf-8')
  print(text)


def search(experiment: Any, topologies: Sequence[Any]) -> None:
  """Ranks layouts on every slice, compiles the best, and prints which of them to choose from."""
  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.pods import search as layouts
  from deepseek_jax.pods.topology import find_devices
  from deepseek_jax.pods.training import plan_training

  folder = None if OUT.value is None else pathlib.Path(OUT.value)
  if SEARCH.value and folder is None:
    raise ConfigError('--search needs --out, the folder for plans and configs')

  def compile_plan(candidate: Any) -> Any:
    return plan_training(candidate.experiment, candidate.topology, find_devices(candidate.topology))

  found = []
  for topology in topologies:
    ranked = layouts.rank(experiment, topology, layouts.Space())
    print(f'{topology.name}\n{layouts.describe_ranking(ranked, ROWS.value)}\n', flush=True)
    if SEARCH.value and folder is not None:
      chosen = layouts.choose(ranked, SEARCH.value)
      found += layouts.compile_best(chosen, folder, compile_plan)
  if found and folder is not None:
    text = layouts.describe_found(found)
    (folder / 'search.txt').write_text(text + '\n', encoding='utf-8')
    print(f'\n{text}')


if __name__ == '__main__':
  launch.run_with_config(main, USAGE)
