"""Seconds of a step over a slow link: two processes, each a replica, whose loopback is throttled.

  python -m experiments.gradient_compression.link [--rates=0,400,100] [--steps=24]
      [--output=link.json]

Linux alone: the two run in a network namespace of their own (`unshare`), on whose loopback `tc`
sets a token bucket, so that nothing else on the machine is slowed down. Rates are Mbit/s, of both
directions together; 0 is unlimited. Prints a table; what was found is in README.md.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

from deepseek_jax.core.describe import table
from deepseek_jax.optim.compression import Adaptive, Exact, LocalSteps, Quantised
from deepseek_jax.train.link import Link, agreed, with_interval
from deepseek_jax.train.step import Program, build_program
from experiments.gradient_compression.measure import experiment

KINDS: dict[str, Any] = {
  'exact': Exact(),
  'int8': Quantised(bits=8),
  'int4': Quantised(bits=4),
  'int4, adaptive interval': LocalSteps(
    interval=Adaptive(share=0.25, start=4, most=64), exchange=Quantised(bits=4)
  ),
}
PORT = 29_871
BURST = '256kb'


def throttle(rate: int) -> None:
  """Sets the rate of the loopback of this namespace, in Mbit/s."""
  subprocess.run(['tc', 'qdisc', 'del', 'dev', 'lo', 'root'], check=False, capture_output=True)
  if rate:
    limit = ['tbf', 'rate', f'{rate}mbit', 'burst', BURST, 'latency', '2s']
    subprocess.run(['tc', 'qdisc', 'add', 'dev', 'lo', 'root', *limit], check=True)


def train(program: Program, step: Any, rows: list[Any], steps: int) -> dict[str, Any]:
  """Takes steps; returns seconds of those without and with an exchange, and the intervals."""
  kind = program.experiment.reduction
  link = Link(kind.interval, window=5) if isinstance(kind, LocalSteps) else None
  state = program.init(jax.random.key(0))
  seconds: dict[bool, list[float]] = {False: [], True: []}
  sent, intervals, began = 0.0, [], time.perf_counter()
  for number in range(steps):
    batch = rows[number % len(rows)]
    start = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics['loss'])
    took, bytes_sent = time.perf_counter() - start, float(metrics['exchanged_bytes'])
    sent += bytes_sent
    seconds[bytes_sent > 0].append(took)
    if link is not None:
      # The first step waits for the other process.
      link.tick(took if number else None, exchanged=bytes_sent > 0)
      measured = link.take()
      if measured is not None:
        measured = agreed(measured)
        state = with_interval(state, measured.steps)
        intervals.append([number + 1, *measured.__dict__.values()])
  return {
    'steps': steps,
    'seconds': time.perf_counter() - began,
    'without': statistics.median(seconds[False]) if seconds[False] else None,
    'with': statistics.median(seconds[True]),
    'exchanges': len(seconds[True]),
    'sent_bytes': sent,
    'intervals': intervals,
  }


def work(arguments: argparse.Namespace) -> None:
  """One of the two processes."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 1)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'127.0.0.1:{PORT}', 2, arguments.process)
  rates, found = [int(rate) for rate in arguments.rates.split(',')], []
  data = experiment(None, 10**6).data.prepare(pathlib.Path(arguments.cache))
  for name, reduction in KINDS.items():
    # A step that is never the last: that one would always exchange.
    program = build_program(experiment(reduction, 10**6), jax.devices())
    step = program.step.compile(program.abstract_state, program.abstract_batch())
    batches = data.train_batches(0)
    rows = [place(program, next(batches)) for _ in range(8)]
    steps = arguments.steps * (4 if isinstance(reduction, LocalSteps) else 1)
    train(program, step, rows, 4)
    for rate in rates:
      multihost_utils.sync_global_devices(f'{name} {rate}')
      if arguments.process == 0:
        throttle(rate)
      multihost_utils.sync_global_devices(f'{name} {rate} set')
      row = {'kind': name, 'mbit': rate, **train(program, step, rows, steps)}
      found.append(row)
      if arguments.process == 0:
        print(json.dumps(row), flush=True)
        arguments.output.write_text(json.dumps(found) + '\n', encoding='utf-8')
        throttle(0)
  if arguments.process == 0:
    print(report(found))


def place(program: Program, batch: Any) -> Any:
  """Lays the whole batch, which both processes have, on the devices of both."""
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, program.batch_sharding, x.__getitem__), batch
  )


def report(found: list[dict[str, Any]]) -> str:
  """Returns the table."""
  lines = []
  for row in found:
    last = row['intervals'][-1][3] if row['intervals'] else 1
    lines.append(
      (
        row['kind'],
        str(row['mbit'] or 'unlimited'),
        f'{row["seconds"] / row["steps"]:.3f}',
        f'{row["with"]:.3f}',
        '' if row['without'] is None else f'{row["without"]:.3f}',
        f'{row["sent_bytes"] / row["steps"] / 1e3:.0f}',
        str(last),
      )
    )
  headers = ('reduction', 'Mbit/s', 's a step', 'with', 'without', 'kB a step', 'interval')
  return table(lines, headers)


def main() -> None:
  """Starts both processes in a namespace, or is one of them."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rates', default='0,400,100')
  parser.add_argument('--steps', type=int, default=24)
  parser.add_argument('--output', type=pathlib.Path, default=pathlib.Path('link.json'))
  parser.add_argument('--process', type=int, help='which of the two; for its own use')
  parser.add_argument('--cache', help='folder of the prepared text; for its own use')
  arguments = parser.parse_args()
  if arguments.process is not None:
    work(arguments)
    return
  with tempfile.TemporaryDirectory() as cache:
    experiment(None, 10).data.prepare(pathlib.Path(cache))
    one = [sys.executable, '-m', 'experiments.gradient_compression.link', f'--cache={cache}']
    one += [f'--rates={arguments.rates}', f'--steps={arguments.steps}']
    one += [f'--output={arguments.output}']
    command = 'ip link set lo up; "$@" --process=1 & "$@" --process=0; s=$?; wait; exit $s'
    inside = ['unshare', '--map-root-user', '--net', 'sh', '-c', command, 'sh', *one]
    sys.exit(subprocess.run(inside, check=False).returncode)


if __name__ == '__main__':
  main()
