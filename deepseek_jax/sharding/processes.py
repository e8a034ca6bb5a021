"""Which process of how many this is, and the start of all of them as one program.

Each process runs the same script and sees the devices of its own host; after `start`, JAX counts
the devices of all hosts. Where the launcher says who is who differs: Slurm, a JobSet of
Kubernetes and Cloud TPU set variables, and by hand three arguments do.
"""

import dataclasses
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.core.config import ConfigError

HEARTBEAT_SECONDS = 20
"""Without a sign of life for so long a process is taken for dead, and all others are ended. JAX's
own 100 s are a long time for a pod to stand still."""
CONNECT_SECONDS = 300
"""How long processes wait for one another at the start: machines of a pod come up one by one."""
LEAVE_SECONDS = 300
"""How long finished processes wait for the first, which still draws the report."""
TPU_PORT = 8476
_EPHEMERAL, _PORTS = 61440, 4096

Environ = Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
  """One process of several.

  Attributes:
    coordinator: 'host:port' that process 0 opens and all others connect to. None: JAX asks the
      machine, as on a TPU VM, whose metadata server knows.
    count: how many processes there are; None as above.
    index: which of them this is, from 0; None as above.
  """

  coordinator: str | None
  count: int | None
  index: int | None

  def __post_init__(self):
    if self.count is None or self.index is None or self.coordinator is None:
      return
    errors = []
    if self.count < 1:
      errors.append(f'process count is {self.count}; expected 1 or more')
    elif not 0 <= self.index < self.count:
      errors.append(
        f'process index is {self.index}, but there are {self.count} processes; expected 0 to '
        f'{self.count - 1}'
      )
    if not re.fullmatch(r'.+:\d+', self.coordinator):
      errors.append(f"coordinator is {self.coordinator!r}; expected 'host:port'")
    if errors:
      raise ConfigError(errors)


def from_arguments(coordinator: str | None, count: int | None, index: int | None) -> Member | None:
  """Returns what three arguments say; None if none is given.

  Raises:
    ConfigError: some are given and others are not, or they contradict one another.
  """
  given = {'--coordinator': coordinator, '--process_count': count, '--process_index': index}
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    return None
  if missing:
    there = ' and '.join(name for name in given if name not in missing)
    raise ConfigError(f'{there} given, but not {" and ".join(missing)}; expected all three or none')
  return Member(coordinator=coordinator, count=count, index=index)


def from_slurm(environ: Environ) -> Member:
  """Returns what `srun` says in the variables of a step; each task is a process.

  Raises:
    ConfigError: this is no task of a step, or a variable is missing or no number.
  """
  names = ('SLURM_STEP_NUM_TASKS', 'SLURM_PROCID', 'SLURM_STEP_NODELIST', 'SLURM_JOB_ID')
  _require(environ, names, 'Slurm', 'start it with `srun`')
  job, step = _number(environ, 'SLURM_JOB_ID'), environ.get('SLURM_STEP_ID', '0')
  # Another port for each step, so that one that is started anew does not meet the one before.
  port = _EPHEMERAL + (job + 31 * int(step if step.isdecimal() else 0)) % _PORTS
  return Member(
    coordinator=f'{first_host(environ["SLURM_STEP_NODELIST"])}:{port}',
    count=_number(environ, 'SLURM_STEP_NUM_TASKS'),
    index=_number(environ, 'SLURM_PROCID'),
  )


def from_kubernetes(environ: Environ) -> Member:
  """Returns what the variables of a JobSet's pod say; see docs/pods for the template.

  `COORDINATOR_ADDRESS` and `PROCESS_COUNT` are set in the template; an indexed job has
  `JOB_COMPLETION_INDEX`. Where the set has several jobs (slices of a TPU), `JOB_INDEX` and
  `PROCESSES_PER_JOB` say which.

  Raises:
    ConfigError: a variable is missing, no number, or contradicts another.
  """
  names = ('COORDINATOR_ADDRESS', 'PROCESS_COUNT', 'JOB_COMPLETION_INDEX')
  _require(environ, names, 'Kubernetes', 'see docs/pods/jobset_gpu.yaml')
  count, index = _number(environ, 'PROCESS_COUNT'), _number(environ, 'JOB_COMPLETION_INDEX')
  pair = ('JOB_INDEX', 'PROCESSES_PER_JOB')
  if any(environ.get(name) for name in pair):
    _require(environ, pair, 'Kubernetes', 'a set of several jobs needs both')
    each = _number(environ, 'PROCESSES_PER_JOB')
    if each < 1 or count % each:
      raise ConfigError(
        f'PROCESS_COUNT is {count}, no multiple of PROCESSES_PER_JOB, which is {each}'
      )
    if index >= each:
      raise ConfigError(
        f'JOB_COMPLETION_INDEX is {index}, but PROCESSES_PER_JOB is {each}; '
        f'expected 0 to {each - 1}'
      )
    index += each * _number(environ, 'JOB_INDEX')
  return Member(coordinator=environ['COORDINATOR_ADDRESS'], count=count, index=index)


def from_tpu(environ: Environ) -> Member:
  """Returns what Cloud TPU says: in variables under Kubernetes, else by its metadata server.

  Raises:
    ConfigError: only some of the variables are set, or they contradict one another.
  """
  pair = ('TPU_WORKER_HOSTNAMES', 'TPU_WORKER_ID')
  if not any(environ.get(name) for name in pair):
    return Member(coordinator=None, count=None, index=None)
  _require(environ, pair, 'Cloud TPU', 'Kubernetes sets both for pods that ask for google.com/tpu')
  hosts = environ['TPU_WORKER_HOSTNAMES'].split(',')
  count, index, first = len(hosts), _number(environ, 'TPU_WORKER_ID'), hosts[0]
  slices = ('MEGASCALE_NUM_SLICES', 'MEGASCALE_SLICE_ID', 'MEGASCALE_COORDINATOR_ADDRESS')
  if index >= count:
    raise ConfigError(
      f'TPU_WORKER_ID is {index}, but TPU_WORKER_HOSTNAMES has {count}; expected 0 to {count - 1}'
    )
  if any(environ.get(name) for name in slices):
    _require(environ, slices, 'Cloud TPU', 'several slices need all three')
    index += count * _number(environ, 'MEGASCALE_SLICE_ID')
    count *= _number(environ, 'MEGASCALE_NUM_SLICES')
    first = environ['MEGASCALE_COORDINATOR_ADDRESS'].split(':')[0]
  return Member(coordinator=f'{first}:{TPU_PORT}', count=count, index=index)


CLUSTERS: dict[str, Callable[[Environ], Member]] = {
  'slurm': from_slurm,
  'kubernetes': from_kubernetes,
  'tpu': from_tpu,
}
"""Name → who says which process this is."""


def find_cluster(environ: Environ) -> str | None:
  """Names the cluster that started this process as one of several; None where it is alone.

  A job array of Slurm has one task in each of its jobs, and what runs in the batch script itself
  is no task of a step: both are alone.
  """
  tasks = environ.get('SLURM_STEP_NUM_TASKS', '1')
  if not tasks.isdecimal() or int(tasks) > 1:
    return 'slurm'
  if environ.get('COORDINATOR_ADDRESS') and environ.get('PROCESS_COUNT'):
    return 'kubernetes'
  if ',' in environ.get('TPU_WORKER_HOSTNAMES', ''):
    return 'tpu'
  return None


def start(member: Member, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> None:
  """Connects this process with all others; before JAX has touched a device.

  From then on a process that dies ends the others, from within JAX: no Python of theirs runs any
  more. Whoever started them has to start them again.

  Args:
    member: who this is.
    heartbeat_seconds: how long no sign of life means dead.

  Raises:
    ConfigError: the coordinator is not there, or does not expect this process.
  """
  import jax

  if member.coordinator is not None:
    say(f'process {member.index} of {member.count}: coordinator {member.coordinator} …')
    if member.index:
      await_coordinator(member, CONNECT_SECONDS)
  # Its handler would take SIGTERM away from ours; see `train.team` for how all agree to stop.
  jax.config.update('jax_enable_preemption_service', False)
  known: dict[str, Any] = {}
  if member.coordinator is not None:
    known = {
      'coordinator_address': member.coordinator,
      'num_processes': member.count,
      'process_id': member.index,
      'cluster_detection_method': 'deactivate',
    }
  try:
    jax.distributed.initialize(
      **known,
      initialization_timeout=CONNECT_SECONDS,
      heartbeat_timeout_seconds=heartbeat_seconds,
      shutdown_timeout_seconds=LEAVE_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    where = member.coordinator or 'the address that the machine told'
    reason = str(error).strip().splitlines()[0][:200]
    raise ConfigError(
      [
        f'process {member.index} of {member.count}: no connection through {where}: {reason}',
        'expected that all processes are started and are told the same coordinator and count',
      ]
    ) from error
  # All processes meet here: whatever waits for the first alone may come later.
  jax.devices()


def await_coordinator(member: Member, seconds: float) -> None:
  """Waits until process 0 listens: JAX would end this process without a word of Python.

  Args:
    member: who this is.
    seconds: to wait; names of hosts, too, may not be known at once.

  Raises:
    ConfigError: nobody has listened for so long.
  """
  assert member.coordinator is not None
  host, _, port = member.coordinator.rpartition(':')
  deadline = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise ConfigError(
          f'process {member.index} of {member.count}: nobody listens at the coordinator '
          f'{member.coordinator} after {seconds:.0f} s ({error.strerror or error}); expected '
          'process 0 there, started and to be reached from this host'
        ) from error
      time.sleep(0.2)


def say(text: str) -> None:
  """Prints a line to standard error: what C++ says after it needs to be understood."""
  print(text, file=sys.stderr, flush=True)


def first_host(nodes: str) -> str:
  """Returns the first host of a list as Slurm writes it: 'node[007-009,12],other' → 'node007'."""
  found = re.match(r'([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,]*))?', nodes)
  if found is None:
    raise ConfigError(f'SLURM_STEP_NODELIST is {nodes!r}; expected names of hosts')
  return ''.join(part or '' for part in found.groups())


def _require(environ: Environ, names: tuple[str, ...], what: str, advice: str) -> None:
  missing = [name for name in names if not environ.get(name)]
  if missing:
    there = [name for name in names if name not in missing]
    state = f'{", ".join(there)} set, but not {", ".join(missing)}' if there else 'no variable set'
    raise ConfigError(f'{what}: {state}; expected {", ".join(names)}: {advice}')


def _number(environ: Environ, name: str) -> int:
  value = environ[name]
  if not value.isdecimal():
    raise ConfigError(f'{name} is {value!r}; expected a number')
  return int(value)
