"""Memory and time of a training step under each rematerialisation, and with microbatches.

  python scripts/bench_remat.py --what=memory --output=results.jsonl
  python scripts/bench_remat.py --what=resident --depths=16 --output=results.jsonl
  python scripts/bench_remat.py --what=time --depths=16 --output=results.jsonl
  python scripts/bench_remat.py --what=accumulation --depths=8 --rows=16 --output=results.jsonl

The model is a small DeepSeek-V3 of experts alone. `memory` is what the compiler reserves beside
arguments and results (`memory_analysis`, the same on every run): for the gradients alone, whose
results are the gradients, so that what is left are activations; and for whole steps, to which
gradients and the optimizer's temporaries add. `resident` compares with what the operating system
counts in a process of its own. Times are medians over rounds in which the variants take turns.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags

WHAT = flags.DEFINE_enum(
  'what', 'memory', ['memory', 'resident', 'time', 'accumulation', 'one'], 'what to measure'
)
DEPTHS = flags.DEFINE_list('depths', ['4', '9', '16', '36', '64'], 'depths; squares suit it')
KINDS = flags.DEFINE_list('kinds', [], 'kinds by name; all by default')
ROWS = flags.DEFINE_integer('rows', 8, 'rows of a batch')
ROUNDS = flags.DEFINE_integer('rounds', 9, 'timed steps of each variant')
OUTPUT = flags.DEFINE_string('output', None, 'file that gets one JSON line a measurement')


QUICK = {'xla_backend_optimization_level': 0}
"""Loops are left unpolished, which takes half as long; buffers are the same."""
STEP_KINDS = ('every_layer', 'compressed')


def kinds() -> dict[str, Any]:
  """Returns the rematerialisations by name."""
  from deepseek_jax.models.remat import Compressed, EveryLayer, Save, SquareRoot

  every = {
    'none': None,
    'every_layer': EveryLayer(),
    'square_root': SquareRoot(),
    'save': Save(names=('attention',)),
    'compressed': Compressed(),
  }
  return {name: kind for name, kind in every.items() if not KINDS.value or name in KINDS.value}


def write(row: dict[str, Any]) -> None:
  """Prints a measurement, and adds it to the file."""
  print(json.dumps(row), flush=True)
  if OUTPUT.value:
    with pathlib.Path(OUTPUT.value).open('a', encoding='utf-8') as file:
      file.write(json.dumps(row) + '\n')


def measure_memory() -> None:
  """Writes the compiler's temporaries of gradients and of a step, of every kind and depth."""
  from deepseek_jax.core.tree import bytes_of
  from deepseek_jax.train.step import build_program
  from experiments.rematerialisation.model import experiment, make_gradients

  done = set()
  if OUTPUT.value and pathlib.Path(OUTPUT.value).exists():
    lines = pathlib.Path(OUTPUT.value).read_text(encoding='utf-8').splitlines()
    earlier = [json.loads(line) for line in lines]
    done = {(row['depth'], row['kind'], row['what']) for row in earlier if 'kind' in row}
  for what in ('gradient_memory', 'step_memory'):
    for depth in map(int, DEPTHS.value):
      for name, remat in kinds().items():
        # Steps are for scale: they take as long to compile again.
        if (depth, name, what) in done or (what == 'step_memory' and name not in STEP_KINDS):
          continue
        program = build_program(experiment(depth, remat, ROWS.value))
        state, batch = program.abstract_state, program.abstract_batch()
        if what == 'gradient_memory':
          lowered = make_gradients(program, remat).lower(state.params, state.buffers, batch)
        else:
          lowered = program.step.lower(state, batch)
        write({
          'what': what,
          'depth': depth,
          'kind': name,
          'rows': ROWS.value,
          'temporary_bytes': lowered.compile(QUICK).memory_analysis().temp_size_in_bytes,
          'gradient_bytes': bytes_of(state.params),
          'state_bytes': bytes_of(state),
        })  # fmt: skip


def ready(chosen: Any) -> tuple[Any, Any, Any]:
  """Returns a compiled step, a state and a batch of random bytes [B, T]."""
  import jax
  import numpy as np

  from deepseek_jax.data.batch import Batch
  from deepseek_jax.train.step import build_program

  program = build_program(chosen)
  step = program.step.compile(program.abstract_state, program.abstract_batch())
  shape = (chosen.data.batch_size, chosen.data.length)
  tokens = np.random.default_rng(0).integers(3, 259, shape).astype(np.int32)
  positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
  ones = np.ones(shape, np.int32)
  arrays = (tokens, tokens, ones.astype(np.float32), positions, ones, ones)
  batch = Batch(*jax.tree.map(jax.numpy.asarray, arrays))
  return (
    step,
    program.init(jax.random.key(0)),
    jax.device_put(batch, jax.tree.map(lambda _: program.batch_sharding, batch)),
  )


def take_turns(made: dict[str, Any], steps: dict[str, int]) -> dict[str, list[float]]:
  """Returns seconds of every round of each variant, `steps` training steps a round."""
  import jax

  states = {name: state for name, (_, state, _) in made.items()}
  spent: dict[str, list[float]] = {name: [] for name in made}
  for _ in range(ROUNDS.value + 1):
    for name, (step, _, batch) in made.items():
      begin = time.perf_counter()
      for _ in range(steps.get(name, 1)):
        states[name], metrics = step(states[name], batch)
      jax.block_until_ready((states[name], metrics))
      spent[name].append(time.perf_counter() - begin)
  # The first round warms up.
  return {name: seconds[1:] for name, seconds in spent.items()}


def measure_time() -> None:
  """Writes the median seconds of a step of every kind."""
  from experiments.rematerialisation.model import experiment

  for depth in map(int, DEPTHS.value):
    made = {n: ready(experiment(depth, remat, ROWS.value)) for n, remat in kinds().items()}
    spent = take_turns(made, {})
    first = spent[next(iter(spent))]
    for name, seconds in spent.items():
      ratios = sorted(a / b for a, b in zip(seconds, first, strict=True))
      write({
        'what': 'time',
        'depth': depth,
        'kind': name,
        'rows': ROWS.value,
        'temporary_bytes': made[name][0].memory_analysis().temp_size_in_bytes,
        'seconds': statistics.median(seconds),
        'ratio': statistics.median(ratios),
        'ratio_quarters': [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
      })  # fmt: skip


def measure_accumulation() -> None:
  """Writes memory and seconds of equal batches in 1 to 8 parts, and of as many small steps."""
  from experiments.rematerialisation.model import experiment

  depth = int(DEPTHS.value[0])
  variants, steps, parts = {}, {}, {}
  for count in (1, 2, 4, 8):
    name = f'{count} microbatches'
    variants[name] = experiment(depth, None, ROWS.value, microbatches=count)
    parts[name] = count
    if count > 1:
      name = f'{count} steps'
      variants[name] = experiment(depth, None, ROWS.value // count)
      steps[name], parts[name] = count, count
  made = {name: ready(chosen) for name, chosen in variants.items()}
  spent = take_turns(made, steps)
  whole = spent['1 microbatches']
  for name, seconds in spent.items():
    step = made[name][0]
    ratios = sorted(b / a for a, b in zip(seconds, whole, strict=True))
    write({
      'what': 'accumulation',
      'variant': name,
      'depth': depth,
      'rows': ROWS.value,
      'rows_at_once': ROWS.value // parts[name],
      'temporary_bytes': step.memory_analysis().temp_size_in_bytes,
      'tokens_per_second': ROWS.value * variants[name].data.length / statistics.median(seconds),
      'speed_ratio': statistics.median(ratios),
      'speed_ratio_quarters': [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    })  # fmt: skip


def measure_resident() -> None:
  """Writes the growth of the resident memory in a process of its own for every kind."""
  for depth in DEPTHS.value:
    for name in kinds():
      command = [sys.executable, '-m', 'scripts.bench_remat', '--what=one', f'--depths={depth}']
      command += [f'--kinds={name}', f'--rows={ROWS.value}']
      result = subprocess.run(command, check=True, capture_output=True, text=True)
      write(json.loads(result.stdout.splitlines()[-1]))


def measure_one() -> None:
  """Writes how much the peak of resident memory rises in steps of one kind."""
  import jax

  from experiments.rematerialisation.model import experiment

  ((name, remat),) = kinds().items()
  depth = int(DEPTHS.value[0])
  step, state, batch = ready(experiment(depth, remat, ROWS.value))
  jax.block_until_ready((state, batch))
  # Compilation has its own peak, which must not hide that of the step.
  pathlib.Path('/proc/self/clear_refs').write_text('5', encoding='utf-8')
  before = status_bytes('VmRSS')
  for _ in range(2):
    state, _ = step(state, batch)
  jax.block_until_ready(state)
  write({
    'what': 'resident',
    'depth': depth,
    'kind': name,
    'rows': ROWS.value,
    'temporary_bytes': step.memory_analysis().temp_size_in_bytes,
    'resident_bytes': status_bytes('VmHWM') - before,
  })  # fmt: skip


def status_bytes(field: str) -> int:
  """Returns a size from the kernel's account of this process (Linux)."""
  text = pathlib.Path('/proc/self/status').read_text(encoding='utf-8')
  (line,) = [line for line in text.splitlines() if line.startswith(f'{field}:')]
  return int(line.split()[1]) * 1024


def main(argv: list[str]) -> None:
  """Measures."""
  del argv
  ways: dict[str, Callable[[], None]] = {
    'memory': measure_memory,
    'resident': measure_resident,
    'time': measure_time,
    'accumulation': measure_accumulation,
    'one': measure_one,
  }
  ways[WHAT.value]()


if __name__ == '__main__':
  app.run(main)
