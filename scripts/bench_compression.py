"""Counts the bytes that a device sends in a step, by mesh axis, for each kind of reduction.

  python scripts/bench_compression.py [--config=quickstart] [--replica=2] [--data=4]
      [--kinds=none,exact,int8,int4] [--output=…]

Counted in the compiled program, scales and padding included, loops as often as they run: what each
collective sends by the algorithm that sends fewest. Those of the last columns cross from slice to
slice. `none` leaves sums to the compiler, which is free to sum over both axes at once; a table says
what it chose. The devices are those of this host; nothing is run. Claim P3.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags

CONFIG = flags.DEFINE_string('config', 'quickstart', 'a config of configs/')
REPLICA = flags.DEFINE_integer('replica', 2, 'slices')
DATA = flags.DEFINE_integer('data', 4, 'devices of a slice')
CHOSEN = flags.DEFINE_list('kinds', ['none', 'exact', 'int8', 'int4'], 'of these')
OUTPUT = flags.DEFINE_string('output', None, 'file for the rows, JSON lines')


def main(argv: list[str]) -> None:
  """Prints a table and, of each kind, what crosses."""
  del argv
  os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} '
    f'--xla_force_host_platform_device_count={REPLICA.value * DATA.value}'
  )
  os.environ['JAX_PLATFORMS'] = 'cpu'

  import dataclasses

  import jax

  from deepseek_jax.core.load import load_config
  from deepseek_jax.core.precision import Float32
  from deepseek_jax.optim.compression import Exact, Quantised
  from deepseek_jax.sharding.mesh import MeshConfig
  from deepseek_jax.sharding.presets import FSDP
  from deepseek_jax.sharding.traffic import read_collectives, sent_by_axes
  from deepseek_jax.train.experiment import resolved
  from deepseek_jax.train.step import build_program

  kinds = {
    'none': None,
    'exact': Exact(),
    'int8': Quantised(bits=8),
    'int4': Quantised(bits=4),
  }
  mesh = MeshConfig(replica=REPLICA.value, data=DATA.value)
  base = resolved(load_config(CONFIG.value), Float32())
  base = dataclasses.replace(base, rules=FSDP, mesh=mesh)
  rows: list[dict[str, Any]] = []
  for name in CHOSEN.value:
    program = build_program(dataclasses.replace(base, reduction=kinds[name]), jax.devices())
    compiled = program.step.lower(program.abstract_state, program.abstract_batch()).compile()
    found = read_collectives(compiled.as_text(), dict(program.mesh.shape))
    crossing = [collective for collective in found if 'replica' in collective.axes]
    row: dict[str, Any] = {
      'kind': name,
      'sent_bytes': {' × '.join(axes): sent for axes, sent in sent_by_axes(found).items()},
      'crossing_bytes': sum(collective.sent_bytes for collective in crossing),
      'crossing_dtypes': sorted({dtype for c in crossing for dtype in c.dtypes}),
    }
    rows.append(row)
    show(row, crossing)
  first = next((row for row in rows if row['kind'] == 'exact'), rows[0])
  print(f'\n{"kind":<8}{"crossing MB":>14}  times less than {first["kind"]}')
  for row in rows:
    ratio = first['crossing_bytes'] / row['crossing_bytes']
    print(f'{row["kind"]:<8}{row["crossing_bytes"] / 1e6:>14.3f}  {ratio:.2f}')
  if OUTPUT.value:
    lines = (json.dumps(row) + '\n' for row in rows)
    pathlib.Path(OUTPUT.value).write_text(''.join(lines), encoding='utf-8')


def show(row: dict[str, Any], crossing: Sequence[Any]) -> None:
  """Prints what one kind sends, and the largest of what crosses from slice to slice."""
  print(f'\n{row["kind"]}: MB that a device sends in a step')
  for axes, sent in sorted(row['sent_bytes'].items()):
    print(f'  along {axes:<18}{sent / 1e6:12.3f}')
  for collective in sorted(crossing, key=lambda collective: -collective.sent_bytes)[:8]:
    print(
      f'    {collective.kind:<14} {"+".join(collective.dtypes):<8} over {collective.size}, '
      f'{collective.sent_bytes / 1e6:9.3f} MB  {collective.name[-60:]}'
    )
  print(f'    {len(crossing)} that cross, {row["crossing_bytes"] / 1e6:.3f} MB', flush=True)


if __name__ == '__main__':
  app.run(main)
