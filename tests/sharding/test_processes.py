"""Who is who, as each cluster says it; and what is said when it does not."""

import socket
import threading
import time

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.sharding.processes import (
  Member,
  await_coordinator,
  find_cluster,
  first_host,
  from_arguments,
  from_kubernetes,
  from_slurm,
  from_tpu,
)

SLURM = {
  'SLURM_STEP_NUM_TASKS': '4',
  'SLURM_NTASKS': '4',
  'SLURM_PROCID': '2',
  'SLURM_STEP_NODELIST': 'gpu[007-009,12]',
  'SLURM_JOB_ID': '10000',
  'SLURM_STEP_ID': '1',
}
JOBSET = {
  'COORDINATOR_ADDRESS': 'run-workers-0-0.run:8476',
  'PROCESS_COUNT': '8',
  'JOB_COMPLETION_INDEX': '3',
}
TPU = {'TPU_WORKER_HOSTNAMES': 'a,b,c,d', 'TPU_WORKER_ID': '3'}
SLICES = {
  'MEGASCALE_NUM_SLICES': '2',
  'MEGASCALE_SLICE_ID': '1',
  'MEGASCALE_COORDINATOR_ADDRESS': 'first:8080',
}


def without(environ, name):
  """The variables but one."""
  return {key: value for key, value in environ.items() if key != name}


def test_slurm():
  member = from_slurm(SLURM)
  assert (member.count, member.index) == (4, 2)
  host, port = member.coordinator.split(':')
  assert host == 'gpu007'
  assert 1024 < int(port) < 65536
  # The next step of the job opens another port, and all tasks of a step the same.
  assert from_slurm(SLURM | {'SLURM_STEP_ID': '2'}).coordinator != member.coordinator
  assert from_slurm(SLURM | {'SLURM_PROCID': '3'}).coordinator == member.coordinator


def test_jobset():
  assert from_kubernetes(JOBSET) == Member(coordinator='run-workers-0-0.run:8476', count=8, index=3)
  several = JOBSET | {'JOB_INDEX': '1', 'PROCESSES_PER_JOB': '4'}
  assert from_kubernetes(several).index == 7


def test_tpu():
  assert from_tpu(TPU) == Member(coordinator='a:8476', count=4, index=3)
  assert from_tpu(TPU | SLICES) == Member(coordinator='first:8476', count=8, index=7)
  # A TPU VM sets nothing: its metadata server is asked.
  assert from_tpu({}) == Member(coordinator=None, count=None, index=None)


def test_by_hand():
  assert from_arguments(None, None, None) is None
  assert from_arguments('h:1', 2, 0) == Member(coordinator='h:1', count=2, index=0)


@pytest.mark.parametrize(
  ('call', 'fault'),
  [
    (lambda: from_slurm({}), 'no variable set; expected SLURM_STEP_NUM_TASKS'),
    (lambda: from_slurm(without(SLURM, 'SLURM_PROCID')), 'but not SLURM_PROCID'),
    (lambda: from_slurm(SLURM | {'SLURM_PROCID': 'x'}), "SLURM_PROCID is 'x'"),
    (lambda: from_slurm(SLURM | {'SLURM_PROCID': '4'}), 'expected 0 to 3'),
    (lambda: from_kubernetes(without(JOBSET, 'COORDINATOR_ADDRESS')), 'not COORDINATOR_ADDRESS'),
    (lambda: from_kubernetes(JOBSET | {'COORDINATOR_ADDRESS': 'host'}), "expected 'host:port'"),
    (lambda: from_kubernetes(JOBSET | {'JOB_INDEX': '1'}), 'not PROCESSES_PER_JOB'),
    (
      lambda: from_kubernetes(JOBSET | {'JOB_INDEX': '1', 'PROCESSES_PER_JOB': '3'}),
      'no multiple of PROCESSES_PER_JOB',
    ),
    (
      lambda: from_kubernetes(JOBSET | {'JOB_INDEX': '0', 'PROCESSES_PER_JOB': '2'}),
      'JOB_COMPLETION_INDEX is 3, but',
    ),
    (lambda: from_tpu(without(TPU, 'TPU_WORKER_ID')), 'not TPU_WORKER_ID'),
    (lambda: from_tpu(TPU | {'TPU_WORKER_ID': '4'}), 'expected 0 to 3'),
    (lambda: from_tpu(TPU | without(SLICES, 'MEGASCALE_SLICE_ID')), 'not MEGASCALE_SLICE_ID'),
    (lambda: from_arguments('h:1', 2, None), 'not --process_index'),
    (lambda: from_arguments(None, None, 0), 'not --coordinator and --process_count'),
    (lambda: from_arguments('h:1', 2, 2), 'expected 0 to 1'),
    (lambda: from_arguments('h:1', 0, 0), 'expected 1 or more'),
  ],
)
def test_what_is_missing_or_wrong_is_named(call, fault):
  with pytest.raises(ConfigError) as caught:
    call()
  assert fault in str(caught.value)


@pytest.mark.parametrize(
  ('environ', 'cluster'),
  [
    ({}, None),
    (SLURM, 'slurm'),
    # A job array, a batch script outside `srun`, a pod and a TPU that are alone.
    (SLURM | {'SLURM_STEP_NUM_TASKS': '1'}, None),
    (without(SLURM, 'SLURM_STEP_NUM_TASKS'), None),
    ({'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'JOB_COMPLETION_INDEX': '0'}, None),
    (JOBSET, 'kubernetes'),
    (TPU, 'tpu'),
    ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}, None),
  ],
)
def test_only_one_of_several_is_taken_for_one(environ, cluster):
  assert find_cluster(environ) == cluster


@pytest.mark.parametrize(
  ('nodes', 'host'),
  [
    ('node7', 'node7'),
    ('node7,other', 'node7'),
    ('node[007-009,12],other', 'node007'),
    ('node[3,7]', 'node3'),
    ('rack[1-2]-gpu,b', 'rack1-gpu'),
  ],
)
def test_first_host(nodes, host):
  assert first_host(nodes) == host


def test_a_coordinator_that_is_not_there_is_named():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
    # Bound, but nobody listens.
    with pytest.raises(ConfigError, match=f'process 1 of 2: nobody listens at .* {address}'):
      await_coordinator(Member(coordinator=address, count=2, index=1), seconds=0.1)


def test_a_coordinator_that_comes_late_is_waited_for():
  with socket.socket() as late:
    late.bind(('127.0.0.1', 0))
    timer = threading.Timer(0.3, late.listen)
    timer.start()
    begin = time.monotonic()
    address = f'127.0.0.1:{late.getsockname()[1]}'
    await_coordinator(Member(coordinator=address, count=2, index=1), seconds=20)
    assert time.monotonic() - begin > 0.2
    timer.join()
