"""Trains in several processes on this machine, and starts them again when one of them dies."""

import dataclasses
import os
import pathlib
import signal
import sys
import time

from absl import flags

from scripts import launch, processes_here

USAGE = r"""
Trains in several processes on this machine, connected as the hosts of a pod are.

  python scripts/launch_local.py --processes=4 -- --config=quickstart --workdir=runs/first …

What stands after -- goes to scripts/train.py, once a process. Where one dies, JAX ends the others;
who died of what is told with the last lines of its log, and all are started again from the newest
checkpoint. SIGTERM and Ctrl-C are passed on: all save after the same step and leave with code 0.

  --processes=N           how many
  --devices=N             host devices of each (default: 1)
  --restarts=N            starts after the first, at most (default: 10)
  --fruitless=N           starts in a row that save nothing new, at most (default: 3)
  --pause_seconds=S       before the first of these; doubles with each (default: 1)
  --after_death=same|fewer  starts as many again (default), or without the one that died, as on a
                          pod that has lost a host: a smaller mesh, the same batch in more parts
  --grace_seconds=S       from a death to the end of those that are still there (default: 15)

The exit code is 0 where the run is done or was asked to stop, 2 where the run says that starting
again cannot help, else that of the process that died first.
"""

PROCESSES = flags.DEFINE_integer('processes', 2, 'how many', lower_bound=1)
DEVICES = flags.DEFINE_integer('devices', 1, 'host devices of each', lower_bound=1)
RESTARTS = flags.DEFINE_integer('restarts', 10, 'starts after the first', lower_bound=0)
FRUITLESS = flags.DEFINE_integer('fruitless', 3, 'starts that save nothing', lower_bound=1)
AFTER_DEATH = flags.DEFINE_enum('after_death', 'same', ['same', 'fewer'], 'how many start again')
PAUSE = flags.DEFINE_float('pause_seconds', 1.0, 'before the first restart', lower_bound=0)
GRACE = flags.DEFINE_float('grace_seconds', 15.0, 'for those that are left', lower_bound=0)
LONGEST_PAUSE = 60.0


def main(arguments: list[str]) -> int:
  """Runs the script; returns the exit code."""
  from deepseek_jax.core.config import ConfigError

  folder = processes_here.argument(arguments, 'workdir')
  if folder is None:
    raise ConfigError("no --workdir after --; expected train.py's arguments there")
  workdir = pathlib.Path(folder)
  stop = processes_here.Relay()
  signal.signal(signal.SIGTERM, stop.note)
  signal.signal(signal.SIGINT, stop.note)
  count, begun, fruitless, pause = PROCESSES.value, newest(workdir), 0, PAUSE.value
  for attempt in range(RESTARTS.value + 1):
    group = processes_here.Group(count, DEVICES.value, arguments, os.environ)
    end = group.wait(stop, GRACE.value)
    if end is None:
      return 0
    print(end.describe(workdir), file=sys.stderr, flush=True)
    if end.code == 2 or stop.number is not None:
      return end.code
    reached = newest(workdir)
    fruitless = 0 if reached > begun else fruitless + 1
    pause = PAUSE.value if reached > begun else min(2 * pause, LONGEST_PAUSE)
    begun = max(begun, reached)
    if fruitless >= FRUITLESS.value:
      tell(f'{fruitless} starts in a row saved nothing new after step {begun}: giving up')
      return end.code
    if attempt == RESTARTS.value:
      tell(f'started {attempt + 1} times: giving up (--restarts)')
      return end.code
    if AFTER_DEATH.value == 'fewer':
      count, arguments = without_one(workdir, count, arguments)
    tell(f'starting all {count} again in {pause:.0f} s, after step {begun}')
    time.sleep(pause)
  raise AssertionError('the loop returns')


def without_one(workdir: pathlib.Path, count: int, arguments: list[str]) -> tuple[int, list[str]]:
  """Returns how many processes are left for a run that lost one, and their arguments.

  Args:
    workdir: the folder of the run.
    count: processes that it ran in.
    arguments: that they were started with.

  Raises:
    ConfigError: there is no run, or it fits on no fewer.
  """
  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.train.shrink import most_that_fit
  from deepseek_jax.train.workdir import Workdir

  experiment = Workdir(workdir).read()
  if experiment is None:
    raise ConfigError(f'{workdir}: a process died before the run was written there')
  left, smaller = most_that_fit(experiment, count, DEVICES.value)
  changed = ('--config.mesh', '--config.microbatches')
  kept = [word for word in arguments if not word.startswith(changed)]
  mesh = ', '.join(f'{name}={size}' for name, size in dataclasses.asdict(smaller.mesh).items())
  added = [f'--config.mesh=MeshConfig({mesh})', f'--config.microbatches={smaller.microbatches}']
  tell(f'going on with {left} processes of {count}: {" ".join(added)}')
  return left, kept + added


def newest(workdir: pathlib.Path) -> int:
  """Returns the newest step that a run could go on after; 0 where nothing is saved."""
  # A folder has its final name once all of it is written.
  names = [path.name for path in (workdir / 'checkpoints').glob('[0-9]*')]
  names += [path.stem for path in (workdir / 'snapshots').glob('process_0/[0-9]*.json')]
  return max((int(name) for name in names if name.isdecimal()), default=0)


def tell(text: str) -> None:
  """Prints a line about the processes, beside those of the first of them."""
  print(f'launch: {text}', file=sys.stderr, flush=True)


if __name__ == '__main__':
  launch.run_with_arguments(main, USAGE)
