"""The parameters of a model, as a table and as a tree to unfold."""

import dataclasses
from typing import Any

import jax
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.describe import table
from deepseek_jax.core.tree import flatten
from deepseek_jax.hub import Pretrained
from deepseek_jax.models.decoder import canonical


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Parameters:
  """Parameters by canonical address; printed it is a table, in a notebook a tree to unfold.

  Attributes:
    tree: nested dict of arrays; layer i is at `layers/<i>`, however the stack groups its scans.
    html: the tree as treescope draws it.
  """

  tree: dict[str, Any]
  html: str = dataclasses.field(repr=False)

  def __str__(self) -> str:
    """One line an array: address, shape, number of parameters, root mean square."""
    rows = [
      (address, '×'.join(map(str, leaf.shape)), f'{leaf.size:,}', f'{_size_of(leaf):.4f}')
      for address, leaf in flatten(self.tree).items()
    ]
    total = sum(leaf.size for leaf in jax.tree.leaves(self.tree))
    return f'{table(rows, ("address", "shape", "parameters", "rms"))}\n{total:,} parameters'

  def _repr_html_(self) -> str:
    """What a notebook shows."""
    return self.html


def parameters(model: Pretrained) -> Parameters:
  """Returns the parameters of a model to look at.

  Raises:
    ConfigError: the package `treescope` is not installed.
  """
  try:
    import treescope
  except ImportError as error:
    raise ConfigError(
      'parameters: needs the package `treescope`, which is in the extra deepseek_jax[notebook]'
    ) from error
  segments = model.decoder.segments
  tree = jax.tree.map(np.asarray, canonical(model.variables['params'], segments))
  return Parameters(tree=tree, html=treescope.render_to_html(tree))


def _size_of(leaf: np.ndarray) -> float:
  return float(np.sqrt(np.mean(np.square(leaf, dtype=np.float64))))
