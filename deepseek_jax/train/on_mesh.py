"""Functions that are traced, compiled and run on the mesh of a run."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A function compiled for arguments of certain shapes.

  Attributes:
    function: from JAX.
    constants: its last arguments.
  """

  function: Any
  constants: tuple[Any, ...]

  def __call__(self, *arguments: Any) -> Any:
    """Calls it."""
    return self.function(*arguments, *self.constants)

  def memory_analysis(self) -> Any:
    """Returns the compiler's count of bytes: `temp_size_in_bytes` and more."""
    return self.function.memory_analysis()


class OnMesh:
  """A jitted function that is always traced and run on its mesh.

  Attributes:
    mesh: the devices.
    function: jitted.
    constants: its last arguments, the same in every call.
  """

  def __init__(self, mesh: Mesh, function: Any, constants: tuple[Any, ...] = ()):
    """Keeps all three."""
    self.mesh, self.function, self.constants = mesh, function, constants

  def __call__(self, *arguments: Any) -> Any:
    """Calls the function."""
    with jax.set_mesh(self.mesh):
      return self.function(*arguments, *self.constants)

  def shapes(self, *arguments: Any) -> Any:
    """Returns the shapes and dtypes of what it returns; compiles nothing."""
    with jax.set_mesh(self.mesh):
      return jax.eval_shape(self.function, *arguments, *self.constants)

  def lower(self, *arguments: Any) -> Any:
    """Lowers the function for arguments or their shapes."""
    with jax.set_mesh(self.mesh):
      return self.function.lower(*arguments, *self.constants)

  def compile(self, *arguments: Any, options: dict[str, Any] | None = None) -> Compiled:
    """Returns the function compiled for arguments or their shapes.

    Args:
      *arguments: without the constants.
      options: of the compiler.
    """
    return Compiled(self.lower(*arguments).compile(options), self.constants)
