"""Counts the bytes of a training step on one of eight devices, by class, layout by layout.

  python scripts/bench_layouts.py [--config=bench_107m] [--layouts=replicated,fsdp,tensor,expert]

Parameters and optimizer are counted from the shards of the state; activations are the temporary
memory of the compiled step, as the compiler has planned it for a CPU: other back ends plan
otherwise. The devices are those of this host; nothing is run. Claim M5.
"""

import dataclasses
import os

from absl import app, flags

DEVICES = 8
LAYOUTS = {
  'replicated': 'rows of the batch alone are shared',
  'fsdp': 'a slice of every weight on each device',
  'tensor': 'heads and hidden units over all eight',
  'expert': 'whole experts over all eight, rows travel; the rest replicated',
  'expert_fsdp': 'whole experts over four, slices of all weights over two',
  'expert_tensor': 'whole experts over four, heads and hidden units over two',
}

CONFIG = flags.DEFINE_string('config', 'bench_107m', 'a config of configs/')
CHOSEN = flags.DEFINE_list('layouts', list(LAYOUTS), f'of {", ".join(LAYOUTS)}')


def main(argv: list[str]) -> None:
  """Prints a table, and ratios to the first layout."""
  del argv
  os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={DEVICES}'
  )
  os.environ['JAX_PLATFORMS'] = 'cpu'

  import jax
  import numpy as np

  from deepseek_jax.core.load import load_config
  from deepseek_jax.core.override import override
  from deepseek_jax.core.precision import Float32
  from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
  from deepseek_jax.sharding.mesh import MeshConfig
  from deepseek_jax.sharding.presets import EXPERT, FSDP, TENSOR
  from deepseek_jax.sharding.rules import Rules
  from deepseek_jax.train.experiment import resolved
  from deepseek_jax.train.step import build_program

  both = {'act_expert': ('expert',), 'expert': ('expert',)}
  rows = ('replica', 'data', 'expert')
  plain = Rules(batch=('replica', 'data'))
  layouts = {
    'replicated': (plain, MeshConfig(data=8)),
    'fsdp': (FSDP, MeshConfig(data=8)),
    'tensor': (TENSOR, MeshConfig(data=1, model=8)),
    'expert': (dataclasses.replace(plain, batch=rows, **both), MeshConfig(data=1, expert=8)),
    'expert_fsdp': (EXPERT, MeshConfig(data=2, expert=4)),
    'expert_tensor': (
      dataclasses.replace(TENSOR, batch=rows, **both),
      MeshConfig(data=1, expert=4, model=2),
    ),
  }
  base = resolved(load_config(CONFIG.value), Float32())

  def held(tree: object) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(
      int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves
    )

  first: list[float] = []
  print(f'{CONFIG.value}, batch {base.data.batch_size} × {base.data.length}: MB a device')
  print(f'{"layout":<14}{"parameters":>12}{"optimizer":>12}{"activations":>13}{"all":>9}  of first')
  for name in CHOSEN.value:
    rules, mesh = layouts[name]
    chosen = dataclasses.replace(base, rules=rules, mesh=mesh)
    if name.startswith('expert'):
      chosen, _ = override(chosen, {'model.feed_forward.dispatch': AllToAll()})
    program = build_program(chosen, jax.devices())
    state = program.abstract_state
    compiled = program.step.lower(state, program.abstract_batch()).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    found = [held(state.params), held(state.opt_state), temporary]
    found = [size / 1e6 for size in [*found, sum(found)]]
    first = first or found
    numbers = ''.join(f'{size:>{width}.0f}' for size, width in zip(found, (12, 12, 13, 9)))
    print(f'{name:<14}{numbers}  {found[-1] / first[-1]:6.2f}   {LAYOUTS[name]}', flush=True)


if __name__ == '__main__':
  app.run(main)
