"""What maths needs to know of the mesh that it runs on."""

import jax


def arrays_are_whole() -> bool:
  """Whether arrays are whole here: on one device, or inside of `shard_map` over all axes.

  Elsewhere the compiler spreads them, which it cannot do to a kernel, nor to a loop over rows.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return all(mesh.shape[axis] == 1 for axis in mesh.auto_axes)
