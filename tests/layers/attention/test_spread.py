"""Attention of rows that devices share is attention of rows on one device."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import (
  tiny_dsa,
  tiny_gated,
  tiny_mha,
  tiny_mla,
  tiny_nsa,
  tiny_recurrent,
  tiny_top_k,
  tiny_v4,
  tiny_window,
)
from deepseek_jax.layers.attention.sparse import Shared, WarmUp
from deepseek_jax.layers.context import Context, packed_context
from deepseek_jax.layers.context_parallel import (
  AllGather,
  Ring,
  ZigZag,
  arrange,
  restore,
)
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import CONTEXT

WIDTH, LENGTH = 32, 64
LENGTHS = ([64], [9, 23, 30], [1, 2, 40, 5], [33, 31])
"""A row of one document; documents that end beside the edges of devices; padding."""


def attention_of(config, **changes):
  return dataclasses.replace(config.get_config().model.attention, **changes)


def v4(name, **changes):
  return dataclasses.replace(getattr(tiny_v4.get_config().model, name), **changes)


KINDS = {
  'mla': lambda: attention_of(tiny_mla),
  'mha': lambda: attention_of(tiny_mha),
  'window': lambda: attention_of(tiny_window, size=7, sinks=3),
  # A window that reaches over several devices.
  'far_window': lambda: attention_of(tiny_window, size=40, sinks=2),
  'no_sinks': lambda: attention_of(tiny_window, size=2, sinks=0),
  'dsa': lambda: attention_of(tiny_dsa, top_k=9),
  'warm_up': lambda: attention_of(tiny_dsa, stage=WarmUp()),
  'shared': lambda: attention_of(tiny_dsa, top_k=9, sharing=Shared(block=8, window=5)),
  'top_k': lambda: attention_of(tiny_top_k, top_k=9),
  'gated': lambda: attention_of(tiny_gated, block=8, window=5),
  'nsa': lambda: attention_of(tiny_nsa),
  'shared_window': lambda: v4('first'),
  'csa': lambda: v4('sparse'),
  'hca': lambda: v4('heavy'),
  'recurrent': lambda: attention_of(tiny_recurrent),
}
DENSE = ('mla', 'mha', 'warm_up')
ANY_ORDER = (*DENSE, 'dsa', 'top_k')
RING, GATHER = Ring(), AllGather()
ZIGZAG = Ring(order=ZigZag())


@functools.cache
def example(kind: str):
  """A module, its variables, an input, and the gradient of its output."""
  module = KINDS[kind]().build()
  context = packed_context(LENGTHS, LENGTH)
  keys = jax.random.split(jax.random.key(7), 3)
  shape = (len(LENGTHS), LENGTH, WIDTH)
  x, grad = (jax.random.normal(key, shape) for key in keys[:2])
  params = nn.meta.unbox(module.init(keys[2], x, context))['params']
  # Scales and biases are not trivial.
  leaves, tree = jax.tree.flatten(params)
  noise = jax.random.split(jax.random.key(8), len(leaves))
  leaves = [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, noise, strict=True)]
  return module, jax.tree.unflatten(tree, leaves), x, grad


def run(kind, context: Context, x: jax.Array, grad: jax.Array):
  """Outputs, the module's own losses, what it observes, and gradients of weights and input."""
  module, params, _, _ = example(kind)

  @jax.jit
  def both(params, x, grad, context):
    def loss(params, x):
      y, reported = module.apply({'params': params}, x, context, mutable=['losses', 'observed'])
      y = y[0] * context.real[..., None]
      own = sum(jax.tree.leaves(reported.get('losses', {})), jnp.float32(0))
      return jnp.sum(y * grad) + own, (y, own, reported.get('observed', {}))

    grads, facts = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return grads, facts

  (to_params, to_x), (y, own, observed) = both(params, x, grad, context)
  tokens = {'input': to_x, 'output': y}
  return tokens, {'weights': to_params, 'loss': own, 'observed': observed}


@functools.cache
def alone(kind):
  """On one device."""
  return run(kind, packed_context(LENGTHS, LENGTH), *example(kind)[2:])


def shared(kind, parallel, mesh_config, rules=CONTEXT):
  """On a mesh, put back in the order of the row."""
  mesh, plain = make_mesh(mesh_config), packed_context(LENGTHS, LENGTH)
  facts = {'order': parallel.order, 'devices': mesh.shape['seq']}
  lay = functools.partial(arrange, **facts)
  context = Context(
    tokens=lay(plain.tokens),
    positions=lay(plain.positions),
    segments=lay(plain.segments),
    rules=rules,
    parallel=parallel,
  )
  with jax.set_mesh(mesh):
    where = NamedSharding(mesh, rules.spec(('batch', 'seq', None)))
    tokens, rest = run(kind, context, *(jax.device_put(lay(x), where) for x in example(kind)[2:]))
  return {name: restore(np.asarray(x), **facts) for name, x in tokens.items()}, rest


def assert_same(found, expected):
  """Every array within 1e-5 of the largest entry of its like."""
  pairs = zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True)
  for (path, a), b in pairs:
    limit = 1e-5 * max(np.abs(b).max(), 1e-3)
    np.testing.assert_allclose(a, b, atol=limit, rtol=0, err_msg=jax.tree_util.keystr(path))


FOUR = MeshConfig(data=2, seq=4)
OFTEN = (('mla', RING), ('dsa', RING), ('hca', RING))
"""What is run every time: keys of all, chosen ones, and entries."""
CASES = [
  pytest.param(kind, parallel, FOUR, marks=[] if (kind, parallel) in OFTEN else [pytest.mark.slow])
  for parallel, fitting in ((RING, KINDS), (GATHER, DENSE), (ZIGZAG, ANY_ORDER))
  for kind in fitting
] + [
  # Heads over `model`, of the kinds that may have them there.
  pytest.param(kind, RING, MeshConfig(data=2, seq=2, model=2), marks=pytest.mark.slow)
  for kind in ('mla', 'mha', 'window')
]


@pytest.mark.parametrize(('kind', 'parallel', 'mesh'), CASES)
def test_sharing_changes_nothing(kind, parallel, mesh):
  """Outputs, losses, what is observed, and gradients of every weight and of the input."""
  assert_same(shared(kind, parallel, mesh), alone(kind))


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'parallel'), [('mla', ZIGZAG), ('dsa', RING), ('csa', RING)])
def test_inside_of_another_axis(kind, parallel):
  """Where `stage` is dealt with outside, as in a pipeline, each stage has rows to share."""
  module, params, x, grad = example(kind)
  mesh, plain = make_mesh(MeshConfig(stage=2, seq=4)), packed_context(LENGTHS, LENGTH)
  facts = {'order': parallel.order, 'devices': 4}
  lay = functools.partial(arrange, **facts)

  def one(params, x):
    parts = (lay(part) for part in (plain.tokens, plain.positions, plain.segments))
    context = Context(*parts, rules=CONTEXT, parallel=parallel)
    y = module.apply({'params': params}, x[0], context, mutable=['losses'])[0][0]
    return (y * context.real[..., None])[None]

  @jax.jit
  def both(params, x, grad):
    stages = PartitionSpec('stage')
    run = jax.shard_map(
      one,
      in_specs=(PartitionSpec(), stages),
      out_specs=stages,
      axis_names={'stage'},
      check_vma=False,
    )
    y, pull = jax.vjp(run, params, x)
    return y, pull(grad)

  with jax.set_mesh(mesh):
    pair = (jnp.stack([lay(a), 2 * lay(a)]) for a in (x, grad))
    y, (to_params, to_x) = jax.device_get(both(params, *pair))

  def expected(params, x):
    y = module.apply({'params': params}, x, plain, mutable=['losses'])[0][0]
    return y * plain.real[..., None]

  total = jax.tree.map(jnp.zeros_like, params)
  for stage, factor in enumerate((1, 2)):
    want, pull = jax.vjp(expected, params, factor * x)
    weights, to_input = pull(factor * grad)
    total = jax.tree.map(jnp.add, total, weights)
    assert_same((restore(y[stage], **facts), restore(to_x[stage], **facts)), (want, to_input))
  assert_same(to_params, total)
