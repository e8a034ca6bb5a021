"""Every router with every dispatch, on one device and on eight, is the plain mixture of experts.

The layer alone, forward and every gradient, against every token through every expert. One program
is compiled for each dispatch and mesh: all routers are in it, and `context.step` says whose choices
count. Beside the routers there are are made-up choices, for the corners that no router goes to.
"""

import dataclasses
import functools
import math
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.dispatch.all_gather import AllGather
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.dispatch.capacity import Capacity
from deepseek_jax.layers.moe.dispatch.local import Local
from deepseek_jax.layers.moe.interface import Assignment
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.balanced import Balanced
from deepseek_jax.layers.moe.router.hash import Hash
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.ops.experts import apply_experts_reference
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import EXPERT
from deepseek_jax.sharding.rules import Rules, logical_axes, tree_shardings, tree_specs

ROWS, LENGTH, D, F, E, K = 8, 5, 8, 6, 8, 2
TOLERANCE = 2e-5

TENSOR = dataclasses.replace(EXPERT, mlp=('model',), expert_mlp=('model',))
LAYOUTS = {
  'no_mesh': (EXPERT, None),
  'one_device': (EXPERT, MeshConfig(data=1)),
  'data_expert': (EXPERT, MeshConfig(data=2, expert=4)),
  'expert': (EXPERT, MeshConfig(expert=8)),
  'data_expert_model': (TENSOR, MeshConfig(data=2, expert=2, model=2)),
  'seq_expert': (dataclasses.replace(EXPERT, seq=('seq',)), MeshConfig(seq=2, expert=4)),
}


def kinds(field: str) -> tuple[type, ...]:
  """The kinds that a field of `MoE` may hold: its union is their registry."""
  annotation = typing.get_type_hints(MoE)[field]
  return typing.get_args(annotation) or (annotation,)


@dataclasses.dataclass(frozen=True)
class MadeUp:
  """Choices that are given, with weights that depend on the token."""

  experts: tuple[tuple[int, int], ...]

  def build(self, experts: int, top_k: int, name: str | None = None) -> nn.Module:
    """A router in form."""
    return MadeUpRouter(self, name=name)


class MadeUpRouter(nn.Module):
  """Token n makes the n-th of the given choices, and begins again after the last."""

  config: MadeUp

  @nn.compact
  def __call__(self, x, context):
    """Chooses."""
    tokens = x.reshape(-1, D)
    given = np.array(self.config.experts, np.int32)
    experts = jnp.asarray(given[np.arange(len(tokens)) % len(given)])
    weights = jnp.where(experts < E, jax.nn.sigmoid(tokens[:, :K]), 0)
    return Assignment(experts, weights, jnp.zeros((len(tokens), E)))


SAMPLES = {Sigmoid: Sigmoid(groups=4, kept_groups=2), Hash: Hash(vocab=64)}
"""Routers that are more telling, or only possible, with fields of their own."""
ROUTERS = {kind.__name__: SAMPLES.get(kind) or kind() for kind in kinds('router')} | {
  'idle_experts': MadeUp(((1, 6), (2, 1), (6, 2), (1, 2), (2, 6))),
  'one_expert': MadeUp(((5, E),)),
  'some_nobody': MadeUp(((7, E), (0, 3), (E, E), (3, 4), (E, 0))),
  'nobody': MadeUp(((E, E),)),
}
ORDER = tuple(ROUTERS)
# Made-up choices may be all on one expert: room for every choice of every token.
DISPATCHES = {
  'Local': Local(),
  'Capacity': Capacity(factor=8.0),
  'AllToAll': AllToAll(),
  'AllGather': AllGather(),
  'AllToAll_in_chunks': AllToAll(chunks=2),
}


@dataclasses.dataclass(frozen=True)
class AnyOf:
  """All routers at once; the step says whose choices count."""

  routers: tuple

  def check(self, experts, top_k):
    """Asks all of them."""
    return [fault for r in self.routers if hasattr(r, 'check') for fault in r.check(experts, top_k)]

  def build(self, experts: int, top_k: int, name: str | None = None) -> nn.Module:
    """A router in form."""
    return AnyOfRouters(self.routers, name=name)


class AnyOfRouters(nn.Module):
  """Runs all routers and picks."""

  routers: tuple

  @nn.compact
  def __call__(self, x, context):
    """Chooses."""
    found = [r.build(E, K, name=f'r{i}')(x, context) for i, r in enumerate(self.routers)]
    pick = lambda name: jnp.stack([getattr(a, name) for a in found])[context.step]  # noqa: E731
    return Assignment(pick('experts'), pick('weights'), pick('scores'))


@dataclasses.dataclass(frozen=True)
class Plain:
  """Every token through every expert."""

  def __call__(self, x, assignment, matrices, context):
    """A dispatch in form."""
    return apply_experts_reference(x, assignment.experts, assignment.weights, matrices), {}


def layer(dispatch) -> nn.Module:
  """The layer with all routers."""
  router = AnyOf(tuple(ROUTERS.values()))
  config = MoE(experts=E, top_k=K, hidden=F, router=router, dispatch=dispatch, balance=None)  # type: ignore[arg-type]
  return config.build()


def segments(length: int) -> np.ndarray:
  """Some padding in some rows; one row is padding alone."""
  ends = np.array([5, 2, 5, 0, 4, 5, 1, 3]) * length // LENGTH
  ends[0] = length
  return (np.arange(length) < ends[:, None]).astype(np.int32)


def context(length: int, rules: Rules, step=0) -> Context:
  """Rows of one document each."""
  ids = np.arange(ROWS * length, dtype=np.int32).reshape(ROWS, length) % 7
  positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
  return Context(ids, positions, segments(length), step=jnp.int32(step), rules=rules)


@functools.cache
def state() -> tuple[typing.Any, typing.Any]:
  """The variables of the layer, all of some size, and the names of their axes."""
  x = jnp.zeros((ROWS, LENGTH, D))
  given = context(LENGTH, EXPERT)
  init = lambda: layer(Plain()).init(jax.random.key(0), x, given)  # noqa: E731
  boxed = jax.eval_shape(init)
  generator = np.random.default_rng(0)
  draw = lambda leaf: generator.normal(0, 0.5, leaf.shape).astype(np.float32)  # noqa: E731
  params = jax.tree.map(draw, nn.meta.unbox(boxed)['params'])
  buffers = jax.jit(lambda: nn.meta.unbox(init()).get('buffers', {}))()
  return {'params': params, 'buffers': buffers}, logical_axes(boxed)


@functools.cache
def program(dispatch, layout: str, length: int):
  """The compiled layer: which router -> outputs of real tokens, all gradients, facts."""
  rules, mesh_config = LAYOUTS[layout]
  variables, axes = state()
  generator = np.random.default_rng(length)
  x, back = generator.standard_normal((2, ROWS, length, D)).astype(np.float32)
  back *= segments(length)[..., None] > 0
  module = layer(dispatch)

  def run(params, rest, x, step):
    def loss(params, x):
      given = context(length, rules, step)
      y, reported = module.apply({**rest, 'params': params}, x, given, mutable=['observed'])
      return jnp.sum(y * back), (y * given.real[..., None], reported['observed'])

    grads, (y, facts) = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return {'y': y, 'x': grads[1], **grads[0]}, facts

  rest = {'buffers': variables['buffers']}
  arguments = variables['params'], rest, x, jnp.int32(0)
  if mesh_config is None:
    return functools.partial(jax.jit(run).lower(*arguments).compile(), *arguments[:3])
  devices = math.prod(size or 1 for size in dataclasses.asdict(mesh_config).values())
  mesh = make_mesh(mesh_config, jax.devices()[:devices])
  put = lambda tree, name: jax.device_put(  # noqa: E731
    tree, tree_shardings(mesh, tree_specs(rules, axes.get(name, {})))
  )
  rest = {name: put(tree, name) for name, tree in rest.items()}
  x = jax.device_put(x, jax.NamedSharding(mesh, rules.spec(('batch', 'seq', None))))
  step = jax.device_put(jnp.int32(0), jax.NamedSharding(mesh, jax.P()))
  arguments = put(variables['params'], 'params'), rest, x, step
  with jax.set_mesh(mesh):
    compiled = jax.jit(run).lower(*arguments).compile()
  place = lambda step: jax.device_put(step, jax.NamedSharding(mesh, jax.P()))  # noqa: E731
  return lambda step: compiled(*arguments[:3], place(step))


@functools.cache
def results(dispatch, layout: str, router: str, length: int = LENGTH):
  """What one router's choices give, on the host."""
  step = jnp.int32(ORDER.index(router))
  return jax.device_get(program(dispatch, layout, length)(step))


def assert_same(found, expected) -> None:
  """Every array within the tolerance, relative to its largest entry."""
  leaves = jax.tree_util.tree_leaves_with_path(expected)
  for (path, want), got in zip(leaves, jax.tree.leaves(found), strict=True):
    where = jax.tree_util.keystr(path)
    np.testing.assert_allclose(
      got, want, rtol=0, atol=TOLERANCE * max(np.abs(want).max(), 1e-3), err_msg=where
    )


def test_nothing_is_left_out():
  """Every dispatch kind is here; and what is compared is not zero."""
  assert {kind.__name__: kind for kind in kinds('dispatch')}.items() <= {
    name: type(dispatch) for name, dispatch in DISPATCHES.items()
  }.items()
  for router in ROUTERS:
    arrays, _ = results(Plain(), 'no_mesh', router)
    experts = 0 if router == 'nobody' else 1e-2
    for name in ('gate', 'up', 'down'):
      assert np.abs(arrays[name]).max() >= experts
    assert min(np.abs(a).max() for a in jax.tree.leaves(arrays['shared'])) > 1e-2
    learning = [np.abs(a).max() for a in jax.tree.leaves(arrays['router'])]
    assert (max(learning) > 1e-3) == (
      not isinstance(ROUTERS[router], (MadeUp, Balanced))
    ) or not learning


PROGRAMS = [
  (kind.__name__, layout, LENGTH)
  for kind in kinds('dispatch')
  for layout in ('one_device', 'data_expert_model')
]
# Chunks of 3 and 2 tokens; one token a row and a device.
PROGRAMS += [('AllToAll_in_chunks', 'expert', LENGTH), ('AllToAll', 'expert', 1)]
MORE = [
  (kind.__name__, layout, LENGTH)
  for kind in kinds('dispatch')
  for layout in ('data_expert', 'expert')
]
MORE += [('AllGather', 'expert', 1), ('AllToAll', 'seq_expert', 6)]
PROGRAMS += [pytest.param(*program, marks=pytest.mark.slow) for program in MORE]


@pytest.mark.parametrize('router', ROUTERS)
@pytest.mark.parametrize(('dispatch', 'layout', 'length'), PROGRAMS)
def test_a_dispatch_changes_nothing(dispatch, layout, length, router):
  """Outputs of real tokens and the gradients of tokens and of all weights."""
  found, facts = results(DISPATCHES[dispatch], layout, router, length)
  expected, _ = results(Plain(), 'no_mesh', router, length)
  assert_same(found, expected)
  assert int(facts.get('dropped', 0)) == 0
