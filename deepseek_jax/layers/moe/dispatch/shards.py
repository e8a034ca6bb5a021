"""Running the routed experts shard by shard: what lies where, and what the shards must share."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.experts import INWARD, OUTWARD
from deepseek_jax.layers.moe.interface import Assignment
from deepseek_jax.ops.experts import ExpertWeights, Gather, apply_experts
from deepseek_jax.sharding.rules import MeshAxes, Rules, shard_count

AXIS = 'expert'
"""The mesh axis that experts are dispatched over."""

Facts = dict[str, jax.Array]


class Part(NamedTuple):
  """What one shard has of the tokens and of their choices.

  Attributes:
    x: [n, D] tokens.
    experts: [n, K] int32, numbers of the whole layer's experts, 0 to E.
    weights: [n, K] float32.
    real: [n] bool, False on padding.
  """

  x: jax.Array
  experts: jax.Array
  weights: jax.Array
  real: jax.Array


def check(experts: int, sizes: Mapping[str, int], rules: Rules) -> list[str]:
  """Returns what keeps `experts` experts from lying on the mesh axis `expert`, as messages."""
  errors = []
  if rules.expert != (AXIS,):
    errors.append(
      f'needs experts that lie on the mesh axis `{AXIS}`, but rules.expert is {rules.expert}; '
      'the preset EXPERT has them there'
    )
  if experts % sizes[AXIS]:
    errors.append(
      f'{experts} experts cannot be shared among the {sizes[AXIS]} devices of mesh axis `{AXIS}`'
    )
  return errors


class Layout(NamedTuple):
  """Mesh axes of the tokens' two axes, and of the parts that their sums come in.

  Attributes:
    rows: axes of the batch.
    columns: axes of the sequence.
    parts: axes along which shards have parts of the sum over experts and hidden units.
  """

  rows: MeshAxes
  columns: MeshAxes
  parts: MeshAxes

  @property
  def tokens(self) -> MeshAxes:
    """Axes that different tokens lie along."""
    return self.rows + self.columns


def token_layout(context: Context, spread: MeshAxes) -> Layout:
  """Returns how tokens lie on the mesh that is set.

  A batch that its devices do not divide (one row, in decoding) is whole on each of them.

  Args:
    context: of [B, T] tokens.
    spread: axes that experts stay on, each with its own.
  """
  rules, sizes = context.rules, dict(jax.sharding.get_abstract_mesh().shape)
  rows, columns = (
    axes if size % shard_count(axes, sizes) == 0 else ()
    for axes, size in zip((rules.batch, rules.seq), context.tokens.shape, strict=True)
  )
  summed = (*spread, *rules.expert_mlp)
  return Layout(rows, columns, tuple(axis for axis in summed if axis not in rows + columns))


class Experts(NamedTuple):
  """What one shard has of the experts.

  Attributes:
    matrices: of its own experts, cut along the axes by which weights are sharded beside.
    gather: makes them whole over the width, for the forward pass and for the gradient.
    shards: how many shards different experts lie on.
  """

  matrices: ExpertWeights
  gather: Gather
  shards: int

  @property
  def held(self) -> int:
    """Experts of this shard, where there are several shards."""
    return len(self.matrices.gate)


Body = Callable[[Part, Experts], tuple[jax.Array, Facts]]


def run(
  body: Body | None,
  x: jax.Array,
  assignment: Assignment,
  matrices: ExpertWeights,
  context: Context,
) -> tuple[jax.Array, Facts]:
  """Runs every shard's experts; `body` is for tokens and experts that both lie along `expert`.

  All axes of the mesh become manual that are not so already: what moves between devices is what is
  written here and in `body`. Weights that are sharded over `expert_embed` are gathered, and their
  gradients so reduced and scattered. Of hidden units a shard keeps its own, as of experts.

  Args:
    body: from the shard's tokens and experts to the results [n, D] of those tokens (over the
      shard's hidden units), and sums over those tokens to log. None leaves tokens where they are
      and gathers all experts to them.
    x: [N, D] tokens.
    assignment: of the N tokens.
    matrices: of all experts.
    context: of [B, T] tokens, B · T = N.

  Returns:
    [N, D], and what `body` logs, summed over all shards.

  Raises:
    ConfigError: the rules have experts on other axes than `expert`.
  """
  mesh, rules = jax.sharding.get_abstract_mesh(), context.rules
  if mesh.empty or mesh.size == 1:
    experts = not_of_padding(assignment.experts, context.real.reshape(-1), len(matrices.gate))
    return apply_experts(x, experts, assignment.weights, matrices), {}
  spread = () if body is None else rules.expert
  if spread not in ((), (AXIS,)):
    raise ConfigError(f"rules.expert is {rules.expert}; this dispatch needs ('{AXIS}',)")
  layout, count = token_layout(context, spread), mesh.shape[AXIS] if spread else 1
  specs = [rules.spec(axes) for axes in (INWARD, INWARD, OUTWARD)]

  kept = {*spread, *(axis for axis in rules.expert_mlp if axis in layout.parts)}
  gather = functools.partial(_gather, specs=specs, kept=kept)

  def shard(x, experts, weights, real, *own):
    part = Part(*(a.reshape(-1, *a.shape[2:]) for a in (x, experts, weights, real)))
    experts = Experts(matrices.of(*own), gather, count)
    if body is not None and count > 1 and AXIS in layout.tokens:
      y, facts = body(part, experts)
    else:
      held = not_of_padding(part.experts, part.real, len(matrices.gate))
      y, facts = apply_own(part._replace(experts=held), experts), {}
    if layout.tokens:
      facts = jax.lax.psum(facts, layout.tokens)
    return y.reshape(1, *x.shape), facts

  tokens = PartitionSpec(layout.rows or None, layout.columns or None)
  mapped = jax.shard_map(
    shard,
    in_specs=(tokens, tokens, tokens, tokens, *specs),
    out_specs=(PartitionSpec(layout.parts or None, *tokens), PartitionSpec()),
    axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
    check_vma=False,
  )
  pair = lambda array: array.reshape(*context.tokens.shape, -1)  # noqa: E731
  y, facts = mapped(
    pair(x), pair(assignment.experts), pair(assignment.weights), context.real, *matrices
  )
  # Summed out here: the gradient of a sum inside would be summed over the shards once more.
  return jnp.sum(y, axis=0).reshape(x.shape), facts


def not_of_padding(experts: jax.Array, real: jax.Array, count: int) -> jax.Array:
  """Returns the choices [N, K] with those of padding (`real` [N] False) given to nobody."""
  return jnp.where(real[:, None], experts, count)


def apply_own(part: Part, experts: Experts) -> jax.Array:
  """Runs tokens [n, D] through the experts of this one shard, and sums over those."""
  own = part.experts
  if experts.shards > 1:
    own = own - experts.held * jax.lax.axis_index(AXIS)
    own = jnp.where((own >= 0) & (own < experts.held), own, experts.held)
  return apply_experts(part.x, own, part.weights, experts.matrices, experts.gather)


def _gather(
  matrices: ExpertWeights, specs: Sequence[PartitionSpec], kept: set[str]
) -> ExpertWeights:
  """Makes a shard's matrices whole along the axes that it cannot use them in parts along."""
  whole = []
  for w, spec in zip(matrices, specs, strict=True):
    for place, entry in enumerate(spec):
      names = (entry,) if isinstance(entry, str) else entry or ()
      names = tuple(name for name in names if name not in kept)
      if names:
        with jax.named_scope('gather'):
          w = jax.lax.all_gather(w, names, axis=place, tiled=True)
    whole.append(w)
  return matrices.of(*whole)
