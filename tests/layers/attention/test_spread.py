"""Attention of rows that devices share is attention of rows on one device."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

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
from deepseek_jax.layers.attention.interface import SharesRows
from deepseek_jax.layers.attention.sparse import Shared, WarmUp
from deepseek_jax.layers.context import Context, packed_context
from deepseek_jax.layers.context_parallel import (
  AllGather,
  Contiguous,
  Partitioned,
  Ring,
  ZigZag,
  arrange,
  restore,
)
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import CONTEXT
from deepseek_jax.sharding.rules import Rules

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
  'no_sinks': lambda: attention_of(tiny_window, size=1, sinks=0),
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


def value_and_gradients(kind, context: Context):
  """Output, the module's own losses, and gradients of weights and input."""
  module, params, x, grad = example(kind)
  order, devices = context.parallel.order, context.tokens.shape[1] // 1
  del order, devices

  def loss(params, x, context):
    y, reported = module.apply({'params': params}, x, context, mutable=['losses', 'observed'])
    y = y[0] * context.real[..., None]
    own = sum(jax.tree.leaves(reported.get('losses', {})), jnp.float32(0))
    return jnp.sum(y * lay(grad, context)) + own, (y, own, reported.get('observed', {}))

  def lay(x, context):
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape['seq']
    return arrange(x, context.parallel.order, shards)

  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  return run, (params, x), lay


def alone(kind):
  run, (params, x), _ = value_and_gradients(kind, packed_context(LENGTHS, LENGTH))
  return run(params, x, packed_context(LENGTHS, LENGTH))


alone = functools.cache(alone)


def shared(kind, parallel, mesh_config, rules=CONTEXT):
  """The same on a mesh, put back in the order of the row."""
  mesh = make_mesh(mesh_config, jax.devices()[: np.prod(list(mesh_config.sizes(8).values()))])
  devices = mesh.shape['seq']
  plain = packed_context(LENGTHS, LENGTH)
  lay = functools.partial(arrange, order=parallel.order, devices=devices)
  context = Context(
    tokens=lay(plain.tokens),
    positions=lay(plain.positions),
    segments=lay(plain.segments),
    rules=rules,
    parallel=parallel,
  )
  run, (params, x), _ = value_and_gradients(kind, context)
  with jax.set_mesh(mesh):
    x = jax.device_put(lay(x), NamedSharding(mesh, rules.spec(('batch', 'seq', None))))
    (total, (y, own, observed)), (to_params, to_x) = run(params, x, context)
  back = functools.partial(restore, order=parallel.order, devices=devices)
  y, to_x = (back(jax.device_get(a)) for a in (y, to_x))
  return (total, (y, own, observed)), (to_params, to_x)


def assert_same(found, expected):
  """Every array within 1e-5 of the largest entry of its like."""
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
  )
  for (path, a), b in pairs:
    limit = 1e-5 * max(np.abs(b).max(), 1e-3)
    np.testing.assert_allclose(a, b, atol=limit, rtol=0, err_msg=jax.tree_util.keystr(path))


CASES = [
  *((kind, RING, MeshConfig(data=2, seq=4)) for kind in KINDS),
  *((kind, GATHER, MeshConfig(data=2, seq=4)) for kind in DENSE),
  *((kind, ZIGZAG, MeshConfig(data=2, seq=4)) for kind in ANY_ORDER),
]


@pytest.mark.parametrize(('kind', 'parallel', 'mesh'), CASES)
def test_sharing_changes_nothing(kind, parallel, mesh):
  """Outputs, losses, what is observed, and gradients of every weight and of the input."""
  assert_same(shared(kind, parallel, mesh), alone(kind))
