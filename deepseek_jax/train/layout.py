"""How every array of a training state lies on the mesh."""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from deepseek_jax.sharding.rules import tree_specs
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.replicas import carry_spec
from deepseek_jax.train.state import TrainState


def state_specs(experiment: Experiment, shapes: TrainState, axes: dict[str, Any]) -> TrainState:
  """Returns the partition spec of every array of the state.

  An array of the optimizer that lies at a parameter's address has the parameter's layout.
  """
  params = tree_specs(experiment.rules, axes['params'])
  buffers = tree_specs(experiment.rules, axes['buffers'])
  table = {
    _names(path): spec
    for path, spec in jax.tree_util.tree_leaves_with_path(
      params, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
  }

  def optimizer_spec(path, leaf):
    return parameter_spec(path, leaf.ndim) or PartitionSpec()

  def parameter_spec(path, rank):
    names = _names(path)
    found = (table.get(names[start:]) for start in range(len(names)))
    return next((spec for spec in found if spec is not None and len(spec) == rank), None)

  return TrainState(
    step=PartitionSpec(),  # type: ignore[arg-type]
    params=params,
    buffers=buffers,
    opt_state=jax.tree_util.tree_map_with_path(optimizer_spec, shapes.opt_state),
    ema=params if jax.tree.leaves(shapes.ema) else (),
    guard=jax.tree.map(lambda _: PartitionSpec(), shapes.guard),
    carry=jax.tree_util.tree_map_with_path(
      lambda path, leaf: carry_spec(leaf, parameter_spec(path, leaf.ndim - 1)), shapes.carry
    ),
  )


def _names(path: Any) -> tuple[str, ...]:
  return tuple(str(getattr(key, 'key', getattr(key, 'name', key))) for key in path)
