"""Runs every variant of a question with every seed; goes on where an earlier sweep was stopped."""

import contextlib
import hashlib
import os
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from scripts import launch

USAGE = r"""
Runs every variant of a question with every seed, each in a process of its own.

  python scripts/sweep.py --experiment=experiments/<question>/sweep.py --output=DIR \
      [--workers=2] [--seeds=3] [--steps=100]

  --experiment=FILE   has base(), variants(), and perhaps match and baseline
  --output=DIR        sweep.json, and a run's folder in <variant>/seed_<n>/. The same command again
                      goes on: finished runs stay as they are, others go on from their checkpoint
  --workers=N         runs side by side, each with its share of the cores (1)
  --seeds=N           seeds 0 to N-1 instead of those that the file asks for
  --steps=N           train_steps of the base instead of its own
  --dry_run           checks every variant, prints what would run, writes nothing
  --plan              the same, and writes sweep.json
  --index=I           runs one of the runs alone, for job arrays
  --print_commands    plans, and prints a command for each run
  --slurm             plans, and prints a job array for sbatch
  --display=auto|live|line
  --cache_dir=DIR     tokens and pack plans (default: ~/.cache/deepseek_jax)

Every variant is built and checked before any runs. The exit code is 1 where a run failed; the
others are run all the same. SIGTERM and Ctrl-C save and exit with code 0.
"""

EXPERIMENT = flags.DEFINE_string('experiment', None, 'file of the question')
OUTPUT = flags.DEFINE_string('output', None, 'folder of the sweep')
WORKERS = flags.DEFINE_integer('workers', 1, 'runs side by side', lower_bound=1)
SEEDS = flags.DEFINE_integer('seeds', None, 'how many seeds', lower_bound=1)
STEPS = flags.DEFINE_integer('steps', None, 'train_steps of the base', lower_bound=1)
DRY_RUN = flags.DEFINE_bool('dry_run', False, 'check, print and exit')
PLAN = flags.DEFINE_bool('plan', False, 'check, print, write sweep.json and exit')
INDEX = flags.DEFINE_integer('index', None, 'run this one alone', lower_bound=0)
PRINT_COMMANDS = flags.DEFINE_bool('print_commands', False, 'print a command for each run')
SLURM = flags.DEFINE_bool('slurm', False, 'print a job array')
DISPLAY = flags.DEFINE_enum('display', 'auto', ['auto', 'live', 'line'], 'terminal')
CACHE_DIR = flags.DEFINE_string('cache_dir', None, 'folder for tokens and pack plans')
TIED = flags.DEFINE_bool('tied', False, 'stop when standard input ends, as the sweep itself asks')
ROOT = pathlib.Path(__file__).resolve().parents[1]
MOST = 60
"""Characters of a value that a line of the plan shows; sweep.json has them whole."""


def main(arguments: list[str]) -> int:
  """Runs the script; returns the exit code."""
  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.lab.question import read_question

  if TIED.value:
    stop_with_parent()
  missing = [f'unexpected argument {argument!r}; see --help' for argument in arguments]
  missing += [
    f'--{name} is missing; for example --{name}={example}'
    for name, value, example in (
      ('experiment', EXPERIMENT.value, 'experiments/balance_kinds/sweep.py'),
      ('output', OUTPUT.value or DRY_RUN.value, 'runs/balance_kinds'),
    )
    if not value
  ]
  modes = [flag.name for flag in (DRY_RUN, PLAN, PRINT_COMMANDS, SLURM) if flag.value]
  modes += [] if INDEX.value is None else ['index']
  if len(modes) > 1:
    missing.append(f'{", ".join(f"--{mode}" for mode in modes)} exclude each other')
  if missing:
    raise ConfigError(missing)
  question = read_question(pathlib.Path(str(EXPERIMENT.value)), ROOT, SEEDS.value, STEPS.value)
  output = None if OUTPUT.value is None else pathlib.Path(OUTPUT.value)
  if DRY_RUN.value:
    plan(question, output, write=False)
    return 0
  assert output is not None
  if INDEX.value is not None:
    return run_one(question, output, INDEX.value)
  if PLAN.value:
    plan(question, output, write=True)
    return 0
  if PRINT_COMMANDS.value or SLURM.value:
    print_jobs(question, output)
    return 0
  return run_sweep(question, output)


def plan(question: Any, output: pathlib.Path | None, write: bool, quiet: bool = False) -> Any:
  """Checks every variant and says what runs; returns the plan."""
  from deepseek_jax.lab.planning import make_plan
  from deepseek_jax.lab.sweep_file import check_same, read_plan, write_plan

  kept = None if output is None else read_plan(output)
  if output is not None and write:
    share_compiled(output)
  made = make_plan(question, launch.cache_dir(CACHE_DIR.value), kept)
  if kept is not None and output is not None:
    check_same(kept, made, output)
  if output is not None and write:
    write_plan(output, made)
  if not quiet:
    print(describe(question, made), flush=True)
  return made


def describe(question: Any, made: Any) -> str:
  """Returns what a sweep runs, in words."""
  from deepseek_jax.core.describe import table
  from deepseek_jax.lab.groups import pair_up
  from deepseek_jax.lab.match import describe_match

  rows = [
    (
      number,
      variant.name,
      '; '.join(map(brief, variant.changes)) or 'nothing',
      variant.experiment.train_steps,
    )
    for number, variant in enumerate(made.variants)
  ]
  parts = [table(rows, ('', 'variant', 'differs from the base in', 'steps'))]
  if question.match is not None:
    matched = {variant.name: variant.matched for variant in made.variants}
    parts.append(describe_match(question.match, matched, pair_up(made.baseline, matched)))
  if made.precision is not None:
    parts.append(f'precision of all runs, measured: {made.precision}')
  runs = len(rows) * len(question.seeds)
  parts.append(
    f'{made.question}: {len(rows)} variants × {len(question.seeds)} seeds = {runs} runs; '
    f'baseline {made.baseline}; all checks passed'
  )
  return '\n\n'.join(parts)


def brief(change: str) -> str:
  """Shortens `path: old → new`: a part in place of another has all of its fields there."""
  sides = change.split(' → ')
  return ' → '.join(side if len(side) <= MOST else f'{side[:MOST]}…' for side in sides)


def command(index: int | str) -> list[str]:
  """Returns the command that runs one of the runs."""
  words = [sys.argv[0], f'--experiment={EXPERIMENT.value}', f'--output={OUTPUT.value}']
  for flag in (SEEDS, STEPS, CACHE_DIR):
    if flag.value is not None:
      words.append(f'--{flag.name}={flag.value}')
  return [*words, f'--index={index}']


def print_jobs(question: Any, output: pathlib.Path) -> None:
  """Plans, and prints commands or a job array; what else there is to say goes to stderr."""
  made = plan(question, output, write=True, quiet=True)
  runs = len(made.variants) * len(question.seeds)
  print(describe(question, made), file=sys.stderr)
  if PRINT_COMMANDS.value:
    for index in range(runs):
      print(shlex.join(['python', *command(index)]))
    return
  logs = output / 'logs'
  logs.mkdir(exist_ok=True)
  words = shlex.join(['python', *command('')])
  print(
    f"""#!/usr/bin/env bash
#SBATCH --job-name={question.name}
#SBATCH --array=0-{runs - 1}
#SBATCH --output={logs}/slurm_%A_%a.log
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
# Submitted from the folder of the source code. SIGTERM comes two minutes before the end: the run
# saves, and the same job again goes on.
exec {words}"$SLURM_ARRAY_TASK_ID\""""
  )


def run_one(question: Any, output: pathlib.Path, index: int) -> int:
  """Runs one of the runs in this process."""
  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.lab.planning import measures
  from deepseek_jax.lab.sweep_file import NAME, status_of, trials_of
  from scripts import training

  planned = (output / NAME).exists()
  if not planned and measures(question):
    raise ConfigError(
      f'--index, and no {output / NAME}: this question times the machine, and every job would find '
      'another time; run once with --plan'
    )
  made = plan(question, output, write=not planned, quiet=True)
  trials = trials_of(made, output, question.seeds)
  if index >= len(trials):
    raise ConfigError(f'--index is {index}; expected 0 to {len(trials) - 1}')
  trial = trials[index]
  share_compiled(output)
  print(f'{trial.name}: run {index} of {len(trials)}', flush=True)
  with locked(trial.log.with_suffix('.lock')):
    if status_of(trial).kind == 'finished':
      print('finished already', flush=True)
      return 0
    cache = launch.cache_dir(CACHE_DIR.value)
    return training.run(trial.experiment, trial.workdir, cache, None, DISPLAY.value)


def run_sweep(question: Any, output: pathlib.Path) -> int:
  """Plans in a process of its own, then runs what is not finished; returns the exit code."""
  import rich.console

  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.lab.sweep_file import read_plan, status_of, trials_of
  from deepseek_jax.train.interrupt import Stop
  from scripts.side_by_side import run_trials, split_cores
  from scripts.sweep_display import SweepDisplay, SweepLines, SweepTable

  with Stop() as stop:
    # This process never touches a device: it would hold the accelerator that the runs need.
    code = wait([sys.executable, *command(0)[:-1], '--plan'], stop)
    if code or stop.requested:
      if stop.requested:
        print(f'{stop.requested}: no run was started')
      return code
    made = read_plan(output)
    assert made is not None
    if made.platform == 'tpu' and WORKERS.value > 1:
      raise ConfigError(
        f"--workers is {WORKERS.value}; a TPU is one process's at a time: expected 1"
      )
    trials = trials_of(made, output, question.seeds)
    indices = {trial.name: index for index, trial in enumerate(trials)}
    left = [trial for trial in trials if status_of(trial).kind != 'finished']
    done = len(trials) - len(left)
    print(f'{done} of {len(trials)} runs are finished already' if done else '', flush=True)
    console = rich.console.Console()
    redraws = console.is_terminal and not console.is_dumb_terminal
    live = DISPLAY.value == 'live' or (DISPLAY.value == 'auto' and redraws)
    display: SweepDisplay = SweepTable(trials, console) if live else SweepLines(len(trials), done)
    try:
      results = run_trials(
        left,
        lambda trial: [
          sys.executable, *command(indices[trial.name]), '--tied', '--display=line'
        ],
        split_cores(WORKERS.value) if made.platform == 'cpu' else [None] * WORKERS.value,
        display,
        stop,
      )  # fmt: skip
    finally:
      display.close()
  return conclude(trials, results, stop.requested)


def conclude(trials: list[Any], results: dict[str, Any], stopped_by: str | None) -> int:
  """Prints how the sweep ended; returns the exit code."""
  from deepseek_jax.lab.sweep_file import status_of
  from scripts.sweep_display import describe_end

  failed = [trial for trial in trials if getattr(results.get(trial.name), 'kind', '') == 'failed']
  finished = sum(status_of(trial).kind == 'finished' for trial in trials)
  if failed:
    print(f'\n{len(failed)} of {len(trials)} runs failed, and are no part of any result:')
    for trial in failed:
      print(describe_end(trial, results[trial.name]))
  print(f'\n{finished} of {len(trials)} runs are finished', end='')
  if stopped_by:
    print(f'; {stopped_by}: the same command goes on')
    return 0
  print('' if finished == len(trials) else '; the same command tries the rest again')
  return 0 if finished == len(trials) else 1


def wait(words: list[str], stop: Any) -> int:
  """Runs a command to its end, or until a signal says to stop; returns its exit code."""
  process = subprocess.Popen(words, start_new_session=True)
  while process.poll() is None:
    if stop.requested:
      process.terminate()
      process.wait()
      return 0
    time.sleep(0.05)
  return process.returncode


def stop_with_parent() -> None:
  """Asks this process to stop when its standard input ends, which is when its parent dies."""

  def watch() -> None:
    # Not through `sys.stdin`, whose lock would be held when Python ends.
    while os.read(0, 1):
      pass
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=watch, name='parent', daemon=True).start()


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Holds a lock file; waits for a process that an earlier sweep left behind and that still saves.

  The system lets go of it when the process dies, by whatever death.
  """
  import fcntl

  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('a') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print('another process runs this; waiting for it to end …', flush=True)
      fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    print(os.getpid(), file=file, flush=True)
    yield


def share_compiled(output: pathlib.Path) -> None:
  """Keeps compiled programs in the sweep's folder, where no other folder was asked for.

  JAX finds a program by what it computes, its options and the compiler's version. It does not look
  at the processor, whose instructions and number are in what XLA makes of it: each kind of
  processor has a folder of its own.
  """
  import jax

  if jax.config.jax_compilation_cache_dir is not None:
    return
  folder = output / 'compiled' / processor()
  jax.config.update('jax_compilation_cache_dir', str(folder.resolve()))


def processor() -> str:
  """Returns a short name of this processor: its instructions, and how many cores are ours."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  words = [platform.machine(), str(cores)]
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    lines = cpuinfo.read_text(encoding='utf-8').splitlines()
    words += [line for line in lines if line.startswith(('flags', 'Features', 'model name'))][:2]
  return f'{platform.machine()}-{hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]}'


if __name__ == '__main__':
  launch.run_with_arguments(main, USAGE)
