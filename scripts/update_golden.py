"""Compares what configs give with the files in tests/golden, or writes those files anew.

  python scripts/update_golden.py             compares, prints differences, exits 1 if there are any
  python scripts/update_golden.py --write     writes the files; read the diff before it is committed
  python scripts/update_golden.py --only=shardings/ [--write]

For each config: its repr; plan, parameters and cost; how every array of the training state lies on
the mesh under each preset; for the tiny configs the losses of 20 steps on one CPU device, and for
one of each family the mean losses of 200.
"""

import dataclasses
import difflib
import functools
import math
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from absl import app, flags

if TYPE_CHECKING:
  from deepseek_jax.train.experiment import Experiment

FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'tests' / 'golden'
TINY = (
  'tiny_v2',
  'tiny_mla',
  'tiny_window',
  'tiny_gated',
  'tiny_mha',
  'tiny_nsa',
  'tiny_recurrent',
  'tiny_top_k',
  'tiny_dsa',
  'tiny_mhc',
  'tiny_v4',
  'tiny_caption',
)
CONFIGS = (
  *TINY,
  'quickstart',
  'image_caption',
  'image_text',
  'visual_questions',
  'five_modalities',
  'ladder',
)
DEVICES = 8
LAID_OUT = tuple(name for name in CONFIGS if name != 'ladder')
"""The ladder's lowest rungs have too few heads for a mesh of eight."""
CURVE_STEPS = 20
CURVE_TOLERANCE = {'step': 0.0, 'loss': 1e-4, 'mtp_loss': 1e-4, 'grad_norm': 5e-3}
"""Relative, by column. Between ways of compiling and between one device and eight, losses were seen
to differ by 5e-6 and norms by 5e-4; a step that computes something else differs more at once."""
FAMILIES = ('tiny_v2', 'tiny_mla', 'tiny_dsa', 'tiny_v4')
"""The smallest runs of V2, V3, V3.2 and V4, which are trained on for 200 steps."""
TRAINING_STEPS, TRAINING_MEAN = 200, 20
TRAINING_TOLERANCE = {'step': 0.0, 'loss': 0.02, 'mtp_loss': 0.02}
"""Relative, of means of 20 steps: what rounding is off by grows from step to step."""
TOLERANCES = {'curves': CURVE_TOLERANCE, 'trainings': TRAINING_TOLERANCE}
SHOWN_LINES = 60
COMMAND = 'python scripts/update_golden.py --write'

WRITE = flags.DEFINE_bool('write', False, 'write the files instead of comparing')
ONLY = flags.DEFINE_string('only', '', 'only files whose path begins with this')


def load(name: str) -> 'Experiment':
  """Returns a config of configs/, with a precision that does not depend on the machine."""
  from deepseek_jax.core.load import load_config
  from deepseek_jax.core.precision import Float32
  from deepseek_jax.train.experiment import resolved

  return resolved(load_config(FOLDER.parents[1] / 'configs' / f'{name}.py'), Float32())


def config_text(name: str) -> str:
  """Returns the config as Python, every field named."""
  from deepseek_jax.core.load import load_config
  from deepseek_jax.core.serialise import to_python

  return to_python(load_config(FOLDER.parents[1] / 'configs' / f'{name}.py')) + '\n'


def model_text(name: str) -> str:
  """Returns plan, parameter table and cost."""
  import jax

  from deepseek_jax.sharding.mesh import MeshConfig
  from deepseek_jax.train.step import build_program
  from deepseek_jax.train.summary import describe_program

  experiment = dataclasses.replace(load(name), mesh=MeshConfig())
  return describe_program(build_program(experiment, jax.devices()[:1])) + '\n'


def sharding_text(name: str) -> str:
  """Returns `path shape dtype spec` of every array of the state and batch, preset by preset."""
  from deepseek_jax.sharding.mesh import MeshConfig
  from deepseek_jax.sharding.presets import EXPERT, FSDP, TENSOR
  from deepseek_jax.train.step import build_program

  layouts = (
    ('FSDP', FSDP, MeshConfig(data=8)),
    ('TENSOR', TENSOR, MeshConfig(data=2, model=4)),
    ('EXPERT', EXPERT, MeshConfig(data=2, expert=4)),
  )
  lines = []
  for preset, rules, mesh in layouts:
    program = build_program(dataclasses.replace(load(name), rules=rules, mesh=mesh))
    sizes = ' '.join(f'{axis}={size}' for axis, size in program.mesh.shape.items())
    lines.append(f'# {preset} on {sizes}')
    lines += _array_lines('batch', program.abstract_batch())
    lines += _array_lines('', program.abstract_state)
    lines.append('')
  return '\n'.join(lines)


def _array_lines(prefix: str, tree: Any) -> Iterator[str]:
  import jax

  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    address = jax.tree_util.keystr(path, simple=True, separator='/')
    spec = ', '.join(repr(entry) for entry in leaf.sharding.spec)
    shape = '×'.join(map(str, leaf.shape)) or 'scalar'
    yield f'{"/".join(filter(None, (prefix, address)))} {shape} {leaf.dtype} ({spec})'


def curve_text(config: str, cache_dir: pathlib.Path) -> str:
  """Returns the loss of each of the first 20 steps on one CPU device."""
  rows = train(load(config), CURVE_STEPS, cache_dir)
  return _table({'step': range(CURVE_STEPS), **rows})


def training_text(config: str, cache_dir: pathlib.Path) -> str:
  """Returns the mean losses of every 20 of 200 steps on one CPU device."""
  experiment = dataclasses.replace(load(config), train_steps=TRAINING_STEPS)
  rows = train(experiment, TRAINING_STEPS, cache_dir)
  del rows['grad_norm']
  starts = range(0, TRAINING_STEPS, TRAINING_MEAN)
  means = {
    name: [statistics.mean(values[start : start + TRAINING_MEAN]) for start in starts]
    for name, values in rows.items()
  }
  return _table({'step': starts, **means})


def _table(columns: dict[str, Sequence[float]]) -> str:
  lines = [' '.join(columns)]
  lines += [' '.join(f'{x:.7g}' for x in row) for row in zip(*columns.values(), strict=True)]
  return '\n'.join(lines) + '\n'


def train(experiment: 'Experiment', steps: int, cache_dir: pathlib.Path) -> dict[str, list[float]]:
  """Returns the losses and the norm of the gradient of each step, by name."""
  import jax

  from deepseek_jax.sharding.mesh import MeshConfig
  from deepseek_jax.train.step import build_program

  experiment = dataclasses.replace(experiment, mesh=MeshConfig())
  program = build_program(experiment, jax.devices('cpu')[:1])
  # The compiler's last polish takes longer than all the steps.
  options = {'xla_backend_optimization_level': 0}
  key = jax.random.key(experiment.seed)
  state = program.init.compile(key, options=options)(key)
  step = program.step.compile(program.abstract_state, program.abstract_batch(), options=options)
  batches = experiment.data.prepare(cache_dir).train_batches(0)
  names: tuple[str, ...] = ('loss', 'grad_norm')
  if experiment.model.mtp is not None:
    names = ('loss', 'mtp_loss', 'grad_norm')
  rows: dict[str, list[float]] = {name: [] for name in names}
  for _ in range(steps):
    state, metrics = step(state, jax.device_put(next(batches), program.batch_sharding))
    for name, values in rows.items():
      values.append(float(metrics[name]))
  return rows


def files(cache_dir: pathlib.Path) -> dict[str, Callable[[], str]]:
  """Returns how to make each golden file, by its path in tests/golden."""
  made: dict[str, Callable[[], str]] = {}
  for name in CONFIGS:
    made[f'configs/{name}.txt'] = functools.partial(config_text, name)
    made[f'models/{name}.txt'] = functools.partial(model_text, name)
  for name in LAID_OUT:
    made[f'shardings/{name}.txt'] = functools.partial(sharding_text, name)
  for name in TINY:
    made[f'curves/{name}.txt'] = functools.partial(curve_text, name, cache_dir)
  for name in FAMILIES:
    made[f'trainings/{name}.txt'] = functools.partial(training_text, name, cache_dir)
  return made


def compare(path: str, found: str) -> str:
  """Returns how a text differs from the golden file, '' where it does not.

  Args:
    path: of the file in tests/golden.
    found: what is made today.
  """
  file = FOLDER / path
  if not file.is_file():
    return f'tests/golden/{path} is missing; to write it: {COMMAND}'
  expected = file.read_text(encoding='utf-8')
  tolerance = TOLERANCES.get(path.partition('/')[0])
  if found == expected or (tolerance and _close(expected, found, tolerance)):
    return ''
  difference = list(
    difflib.unified_diff(
      expected.splitlines(), found.splitlines(), 'golden', 'now', lineterm='', n=0
    )
  )
  if len(difference) > SHOWN_LINES:
    difference[SHOWN_LINES:] = [f'… and {len(difference) - SHOWN_LINES} more lines']
  return '\n'.join(
    [f'tests/golden/{path} differs:', *difference, f'If the change is meant: {COMMAND}']
  )


def _close(expected: str, found: str, tolerance: dict[str, float]) -> bool:
  """Whether two tables of numbers under the same headers agree, column by column."""
  rows, others = ([line.split() for line in text.splitlines()] for text in (expected, found))
  if [len(row) for row in rows] != [len(row) for row in others] or rows[0] != others[0]:
    return False
  if not set(rows[0]) <= tolerance.keys():
    return False
  limits = [tolerance[header] for header in rows[0]]
  return all(
    math.isclose(float(a), float(b), rel_tol=limit)
    for row, other in zip(rows[1:], others[1:])
    for a, b, limit in zip(row, other, limits)
  )


def main(argv: list[str]) -> None:
  """Compares or writes."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  failed = False
  with tempfile.TemporaryDirectory() as cache:
    for path, make in files(pathlib.Path(cache)).items():
      if not path.startswith(ONLY.value):
        continue
      fault = compare(path, text := make())
      if fault and WRITE.value:
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / path).write_text(text, encoding='utf-8')
        print(f'wrote tests/golden/{path}')
      elif fault:
        print(fault)
        failed = True
  sys.exit(failed)


if __name__ == '__main__':
  # Before JAX is imported, by the functions above.
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={DEVICES}'
  )
  app.run(main)
