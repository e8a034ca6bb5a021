"""Bytes that collectives move, against programs whose bytes are known."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from scripts.collective_bytes import moved_bytes

N, DEVICES, STEPS = 96, 4, 3
RING = [(place, (place + 1) % DEVICES) for place in range(DEVICES)]


def test_every_kind_and_loops():
  """Each on N floats a device; one that runs in a loop counts as often."""

  def run(x):
    whole = jax.lax.all_gather(x, 'seq', tiled=True)
    part = jax.lax.psum_scatter(whole * 2, 'seq', tiled=True)
    part, _ = jax.lax.scan(
      lambda c, _: (jax.lax.ppermute(jnp.sin(c), 'seq', RING), None), part, length=STEPS
    )
    turned = jax.lax.all_to_all(part.reshape(DEVICES, -1), 'seq', 0, 0)
    return jax.lax.psum(jnp.cos(turned), 'seq')

  mapped = jax.shard_map(
    run,
    in_specs=PartitionSpec('seq'),
    out_specs=PartitionSpec(),
    axis_names={'seq'},
    check_vma=False,
  )
  with jax.set_mesh(make_mesh(MeshConfig(seq=DEVICES), jax.devices()[:DEVICES])):
    text = jax.jit(mapped).lower(jnp.zeros(N * DEVICES)).compile().as_text()
  size = 4 * N
  assert moved_bytes(text) == {
    'all-gather': size * (DEVICES - 1),
    'reduce-scatter': size * (DEVICES - 1),
    'collective-permute': size * STEPS,
    'all-to-all': size * (DEVICES - 1) // DEVICES,
    'all-reduce': 2 * size * (DEVICES - 1) // DEVICES,
  }
