"""Trains a model; goes on where an earlier run in the same folder was stopped."""

import pathlib
from typing import Any

from absl import flags

from scripts import launch, training

USAGE = r"""
Trains a model.

  python scripts/train.py --config=configs/quickstart.py --workdir=runs/first \
      [--config.model.depth=6] [--config.model.attention='Window(size=64)'] …

  --config=FILE           a config file, or the name of one in configs/; arguments of its function
                          may follow: 'ladder(depth=4)'
  --config.path=value     changes one part; kinds are written Name(key=value)
  --workdir=DIR           the run's folder; a run that is there goes on
  --dry_run               checks everything, prints what the run would be, and exits
  --display=auto|live|line|quiet
  --cache_dir=DIR         tokens and pack plans (default: ~/.cache/deepseek_jax)
  --cluster=auto|alone|slurm|kubernetes|tpu
                          who says which process of how many this is; auto looks at what Slurm,
                          a JobSet or Cloud TPU have set, see docs/pods/README.md
  --coordinator=HOST:PORT --process_count=4 --process_index=2
                          says it by hand

In the folder: report.html, metrics.jsonl, evaluations.jsonl, samples.jsonl, tensorboard/,
checkpoints/, config.json, and config.py that repeats the run. SIGTERM and Ctrl-C save and exit
with code 0.
"""

WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run')
DRY_RUN = flags.DEFINE_bool('dry_run', False, 'check, print and exit')
DISPLAY = flags.DEFINE_enum('display', 'auto', ['auto', 'live', 'line', 'quiet'], 'terminal')
CACHE_DIR = flags.DEFINE_string('cache_dir', None, 'folder for tokens and pack plans')
CLUSTER = flags.DEFINE_enum(
  'cluster', 'auto', ['auto', 'alone', 'slurm', 'kubernetes', 'tpu'], 'who started the processes'
)
COORDINATOR = flags.DEFINE_string('coordinator', None, 'host:port of process 0')
PROCESS_COUNT = flags.DEFINE_integer('process_count', None, 'how many processes there are')
PROCESS_INDEX = flags.DEFINE_integer('process_index', None, 'which of them this is, from 0')
COMPILE_LIMIT = 4e9
"""Parameters beyond which a dry run does not compile the step."""


def main(config_path: str | None, assignments: dict[str, str]) -> int:
  """Runs the script; returns the exit code."""
  by_hand = (COORDINATOR.value, PROCESS_COUNT.value, PROCESS_INDEX.value)
  member = launch.find_member(CLUSTER.value, by_hand)
  if member is None:
    return work(config_path, assignments)
  return launch.run_member(member, lambda: work(config_path, assignments))


def work(config_path: str | None, assignments: dict[str, str]) -> int:
  """Trains, or says what training would be; returns the exit code."""
  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.core.override import override_from_text
  from deepseek_jax.train.workdir import Workdir

  if config_path is None:
    raise ConfigError('--config is missing; for example --config=configs/quickstart.py')
  experiment, changes = override_from_text(launch.load_experiment(config_path), assignments)
  for change in changes:
    print(f'changed  {change}')
  cache = launch.cache_dir(CACHE_DIR.value)
  if DRY_RUN.value:
    return dry_run(experiment, cache)
  if WORKDIR.value is None:
    raise ConfigError('--workdir is missing; for example --workdir=runs/first')
  workdir = Workdir(pathlib.Path(WORKDIR.value))
  return training.run(experiment, workdir, cache, config_path, DISPLAY.value)


def dry_run(experiment: Any, cache: pathlib.Path) -> int:
  """Prints what a run would be."""
  from deepseek_jax.core.precision import Float32
  from deepseek_jax.core.serialise import to_python
  from deepseek_jax.train import summary
  from deepseek_jax.train.experiment import resolved
  from deepseek_jax.train.initialise import open_origin
  from deepseek_jax.train.step import build_program

  print(to_python(experiment), end='\n\n')
  program = build_program(resolved(experiment, Float32()))
  print(summary.describe_program(program), end='\n\n')
  weights = summary.experiment_weights(program)
  small = sum(weight.size for weight in weights) < COMPILE_LIMIT
  print(summary.describe_memory(program, compile_step=small), end='\n\n')
  origin = open_origin(program)
  if origin is not None:
    print(origin.describe(), end='\n\n')
  data = experiment.data.prepare(cache)
  print(summary.describe_batch(next(data.train_batches(0))))
  rows = experiment.data.batch_size * experiment.train_steps
  print(
    f'\n{data.train.rows:,} training rows ({data.train.occupancy:.1%} full), '
    f'{rows / data.train.rows:.2f} epochs; {data.heldout.text_bytes:,} held-out bytes'
  )
  print('\nall checks passed')
  return 0


if __name__ == '__main__':
  launch.run_with_config(main, USAGE)
