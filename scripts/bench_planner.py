"""Does the planner rank layouts as a clock does? Estimated against measured steps, on this CPU.

  python scripts/bench_planner.py [--steps=5]

A small model is trained on eight host devices in every layout of the list. The planner knows what
it measures of this machine first: its matrix rate, its bandwidth, a gather and the start of one.
Prints a table and Spearman's rank correlation; exits with 1 if that is below 0.8. The estimate of
an eighth of this machine stands for a device, since all eight share its cores. The memory that a
step gives back is kept by the process: a chip has no page faults, which are a third of some steps.
"""

import dataclasses
import os
import sys
import time
from typing import Any

from absl import app, flags

DEVICES = 8
# Of glibc's allocator, which reads them when the process starts.
KEEP_PAGES = {
  'MALLOC_ARENA_MAX': '1',
  'MALLOC_MMAP_MAX_': '0',
  'MALLOC_TRIM_THRESHOLD_': str(2**33),
}
STEPS = flags.DEFINE_integer('steps', 5, 'measured steps of each layout; the fastest counts')


def main(argv: list[str]) -> None:
  """Prints a table, and how well two orders agree."""
  del argv
  started_with = dict(os.environ)
  os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={DEVICES}'
  )
  os.environ['JAX_PLATFORMS'] = 'cpu'
  if any(os.environ.get(name) != value for name, value in KEEP_PAGES.items()):
    os.execve(sys.executable, sys.orig_argv, {**started_with, **KEEP_PAGES})

  from deepseek_jax.core.describe import table
  from deepseek_jax.pods.topology import Topology

  topology = Topology(generation='host', shape=(DEVICES,), measured=host_chip())
  chip = topology.chip
  print(
    f'a device: {chip.rate("f32") / 1e9:.1f} GFLOP/s, {chip.hbm_bandwidth / 1e9:.2f} GB/s, gathers '
    f'{2 * chip.ici_link / 1e9:.2f} GB/s, starts one in {chip.hop_seconds * 1e6 / 4:.0f} µs'
  )
  rows, pairs = [], []
  for name, experiment in layouts().items():
    estimated, taken = estimate_and_measure(experiment, topology)
    pairs.append((estimated, taken))
    rows.append((name, f'{estimated * 1e3:.1f}', f'{taken * 1e3:.1f}', f'{taken / estimated:.2f}'))
    print(f'{name}: {taken * 1e3:.1f} ms', flush=True)
  agreement = spearman([a for a, _ in pairs], [b for _, b in pairs])
  print(table(rows, ('layout', 'estimated ms', 'measured ms', 'ratio')))
  print(f'rank correlation of {len(pairs)} layouts: {agreement:.3f}')
  sys.exit(0 if agreement >= 0.8 else 1)


def layouts() -> dict[str, Any]:
  """Every layout by name: meshes and rules, microbatches, remat, with experts and without."""
  from configs import tiny_mla
  from deepseek_jax.core.override import override
  from deepseek_jax.layers.attention.latent import MLA
  from deepseek_jax.layers.feed_forward import SwiGLU
  from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
  from deepseek_jax.models.remat import EveryLayer
  from deepseek_jax.sharding.mesh import MeshConfig
  from deepseek_jax.sharding.presets import EXPERT, FSDP, TENSOR
  from deepseek_jax.sharding.rules import Rules

  base: Any = tiny_mla.get_config()
  attention = MLA(heads=8, nope_dim=32, rope_dim=16, value_dim=32, latent=64, query_latent=None)
  model: Any = base.model
  dense = dataclasses.replace(
    model, depth=4, width=256, attention=attention, dense=SwiGLU(hidden=1024),
    dense_layers=4, mtp=None,
  )  # fmt: skip
  moe = dataclasses.replace(
    dense,
    dense_layers=1,
    feed_forward=dataclasses.replace(model.feed_forward, hidden=512, dispatch=AllToAll(bound=2.0)),
  )
  data = dataclasses.replace(base.data, length=32, batch_size=64)
  plain = Rules(batch=('replica', 'data'))
  chosen: dict[str, tuple[Any, Any, Any, int, Any]] = {
    'replicated': (dense, plain, MeshConfig(data=8), 1, None),
    'replicated, remat': (dense, plain, MeshConfig(data=8), 1, EveryLayer()),
    'replicated, 8 microbatches': (dense, plain, MeshConfig(data=8), 8, None),
    'fsdp': (dense, FSDP, MeshConfig(data=8), 1, None),
    'fsdp, remat': (dense, FSDP, MeshConfig(data=8), 1, EveryLayer()),
    'fsdp, remat, 8 microbatches': (dense, FSDP, MeshConfig(data=8), 8, EveryLayer()),
    'tensor 2': (dense, TENSOR, MeshConfig(data=4, model=2), 1, None),
    'tensor 8': (dense, TENSOR, MeshConfig(data=1, model=8), 1, None),
    'tensor 8, 4 microbatches': (dense, TENSOR, MeshConfig(data=1, model=8), 4, EveryLayer()),
    'expert 4': (moe, EXPERT, MeshConfig(data=2, expert=4), 1, None),
    'expert 4, remat': (moe, EXPERT, MeshConfig(data=2, expert=4), 1, EveryLayer()),
    'expert 8, 4 microbatches': (moe, EXPERT, MeshConfig(data=1, expert=8), 4, EveryLayer()),
    'experts in fsdp': (moe, FSDP, MeshConfig(data=8), 1, None),
  }
  result = {}
  for name, (model, rules, mesh, microbatches, remat) in chosen.items():
    run = dataclasses.replace(
      base, model=model, data=data, rules=rules, mesh=mesh, microbatches=microbatches, remat=remat
    )
    if rules is FSDP and model is moe:
      run = override(run, {'model.feed_forward.dispatch': 'Local()'})[0]
    result[name] = run
  return result


def host_chip() -> Any:
  """Measures an eighth of this machine."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  from deepseek_jax.pods.chips import Chip
  from deepseek_jax.train.throughput import measure_matmul_peak

  mesh = Mesh(np.array(jax.devices()), ('data',))
  spread = NamedSharding(mesh, PartitionSpec('data'))
  whole = NamedSharding(mesh, PartitionSpec())

  def seconds(function: Any, x: Any) -> float:
    jax.block_until_ready(function(x))
    best = float('inf')
    for _ in range(10):
      start = time.perf_counter()
      jax.block_until_ready(function(x))
      best = min(best, time.perf_counter() - start)
    return best

  # Half a MiB a device, as the layouts' weights and activations are.
  large = jax.device_put(jnp.ones((DEVICES, 2**17)), spread)
  small = jax.device_put(jnp.ones((DEVICES, 8)), spread)
  add = jax.jit(lambda x: x + 1, out_shardings=spread)
  gather = jax.jit(lambda x: x * 2, out_shardings=whole)
  begin = seconds(gather, small)
  sent = large.nbytes * (DEVICES - 1) / DEVICES
  rate = measure_matmul_peak(jnp.float32, 2.0) / DEVICES
  bandwidth = 2 * large.nbytes / DEVICES / max(seconds(add, large) - seconds(add, small), 1e-6)
  return Chip(
    name='host',
    device_kind='cpu',
    matrix_flops={'f32': rate, 'bf16': rate},
    vector_flops=bandwidth,
    clock_hz=1e9,
    hbm_bytes=2**34,
    hbm_bandwidth=bandwidth,
    ici_axes=1,
    # A ring is used both ways; its longest way is half of it.
    ici_link=sent / max(seconds(gather, large) - begin, 1e-6) / 2,
    hop_seconds=begin / (DEVICES // 2),
    dcn_bandwidth=1e9,
    vmem_bytes=2**20,
    ring=1,
  )


def estimate_and_measure(experiment: Any, topology: Any) -> tuple[float, float]:
  """Returns the estimated and the fastest measured seconds of a training step."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.pods.topology import compile_program
  from deepseek_jax.pods.training import read_training
  from deepseek_jax.train.step import build_program

  program = build_program(experiment, jax.devices())
  given = program.abstract_state, program.abstract_batch()
  plan = read_training(program, topology, compile_program(lambda: program.step.lower(*given)))
  state = program.init(jax.random.key(0))
  batch = jax.tree.map(
    lambda leaf: jax.device_put(jnp.ones(leaf.shape, leaf.dtype), leaf.sharding), given[1]
  )
  best = float('inf')
  for _ in range(STEPS.value + 1):
    start = time.perf_counter()
    state, metrics = program.step(state, batch)
    jax.block_until_ready(metrics['loss'])
    best = min(best, time.perf_counter() - start)
  return plan.time.step_seconds, best


def spearman(first: list[float], second: list[float]) -> float:
  """Returns the correlation of two lists' ranks."""
  import numpy as np

  ranks = [np.argsort(np.argsort(values)) for values in (first, second)]
  return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


if __name__ == '__main__':
  app.run(main)
