"""Prefill and decode: pure functions of weights, tokens and a cache that is passed in and out.

Prompts of a batch are padded on the right. Padding has segment 0, which leaves no trace in a cache
and which no token sees, so a row's results do not depend on how far it was padded.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.infer.sample import Sampler
from deepseek_jax.layers.context import Context
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.stack import empty_caches
from deepseek_jax.sharding.rules import Rules

Variables = dict[str, Any]
"""The collections of a model: `params` and `buffers`."""


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def fresh_caches(decoder: Decoder, batch: int, slots: int, spare: int = 0) -> Any:
  """Returns empty caches of `batch` sequences of up to `slots` tokens, in the compute dtype.

  Of the tokens fed last, up to `spare` can be taken back by feeding earlier positions again.
  """
  # The plan of this very decoder: rematerialisation may have grouped its layers otherwise.
  segments = decoder.segments
  return whole(empty_caches(segments, batch, slots, decoder.dtype, spare))


def prefill(
  decoder: Decoder,
  variables: Variables,
  caches: Any,
  tokens: jax.Array,
  start: jax.Array,
  counts: jax.Array,
) -> tuple[jax.Array, Any]:
  """Feeds the next tokens of every row, any number of them.

  Args:
    decoder: the model.
    variables: `params` and `buffers`.
    caches: what the rows have seen so far; from `fresh_caches`, or a result of this function.
    tokens: [B, T] int32; row b holds `counts[b]` tokens, then padding.
    start: [B] int32 position of each row's first token here.
    counts: [B] int32 tokens of each row, 0 to T.

  Returns:
    [B, V] float32 logits after each row's last token here (of a row without any: meaningless),
    and the caches.
  """
  batch, length = tokens.shape
  offsets = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
  context = Context(
    tokens=tokens,
    positions=start[:, None] + offsets,
    segments=(offsets < counts[:, None]).astype(jnp.int32),
  )
  return prefill_context(decoder, variables, caches, context, counts)


def prefill_context(
  decoder: Decoder, variables: Variables, caches: Any, context: Context, counts: jax.Array
) -> tuple[jax.Array, Any]:
  """Feeds the next tokens of every row as a context [B, T] has them, pictures among them.

  Arguments and results are otherwise those of `prefill`.
  """

  def forward(module: Decoder, context: Context, caches: Any) -> tuple[jax.Array, Any]:
    hidden, caches = module(context, caches)
    # One position a row: logits of a whole prompt would be the largest array of all.
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    return module.logits(jnp.take_along_axis(hidden, last, axis=1), context)[:, 0], caches

  return whole(decoder.apply(variables, context, caches, method=forward))


def decode_step(
  decoder: Decoder,
  variables: Variables,
  caches: Any,
  tokens: jax.Array,
  positions: jax.Array,
) -> tuple[jax.Array, Any]:
  """Feeds one token a row.

  Args:
    decoder: the model.
    variables: `params` and `buffers`.
    caches: what the rows have seen so far.
    tokens: [B] int32.
    positions: [B] int32 their positions.

  Returns:
    [B, V] float32 logits of the token after, and the caches.
  """
  fed = tokens[:, None]
  if alone_is_slow(decoder, len(tokens)):
    fed = jnp.pad(fed, ((0, 0), (0, 1)))
  return prefill(decoder, variables, caches, fed, positions, jnp.ones_like(positions))


def alone_is_slow(decoder: Decoder, rows: int) -> bool:
  """Says whether one token is fed faster with a token of padding beside it.

  XLA:CPU multiplies a single bfloat16 row with a matrix in a plain loop; two rows go to a library
  that is some seven times faster (`scripts/bench_hub.py --beside=single`).
  """
  return rows == 1 and decoder.dtype == jnp.bfloat16 and jax.default_backend() == 'cpu'


def full_logits(
  decoder: Decoder, variables: Variables, tokens: jax.Array, counts: jax.Array
) -> jax.Array:
  """Runs the model without a cache: the logits [B, T, V] float32 after every token.

  Args:
    decoder: the model.
    variables: `params` and `buffers`.
    tokens: [B, T] int32, padded on the right.
    counts: [B] int32 tokens of each row; what is beyond them is meaningless.
  """
  offsets = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
  context = Context(
    tokens=tokens,
    positions=offsets,
    segments=(offsets < counts[:, None]).astype(jnp.int32),
  )

  def forward(module: Decoder, context: Context) -> jax.Array:
    return module.logits(module(context)[0], context)

  return whole(decoder.apply(variables, context, method=forward))


def choose(sampler: Sampler, logits: jax.Array, seed: jax.Array, index: jax.Array) -> jax.Array:
  """Draws the next token [B] int32 of every row from logits [B, V].

  The key of row r's token number `index` is made of the seed, r and `index` alone, so that a row
  draws the same whatever rows are beside it.
  """
  indices = jnp.full(logits.shape[0], index)
  return whole(sampler(logits, row_keys(seed, indices)))


def row_keys(seed: jax.Array, indices: jax.Array) -> jax.Array:
  """Returns the key of token number `indices` [B] of every row [B]."""
  key, fold = jax.random.key(seed), jax.random.fold_in
  rows = jnp.arange(indices.shape[0])
  return jax.vmap(lambda row, index: fold(fold(key, row), index))(rows, indices)


# Compiled once for each decoder and set of shapes, for the whole process: weights are arguments,
# so that samples during training compile nothing new. The cache's memory is used again.
jit_prefill = jax.jit(prefill, static_argnums=0, donate_argnums=2)
jit_decode_step = jax.jit(decode_step, static_argnums=0, donate_argnums=2)
jit_full_logits = jax.jit(full_logits, static_argnums=0)
jit_choose = jax.jit(choose, static_argnums=0)


class PlacedModel:
  """A decoder and its variables, called on the mesh that the variables lie on."""

  def __init__(self, decoder: Decoder, variables: Variables):
    """Finds the mesh, if the variables lie on one of several devices."""
    self.decoder, self.variables = decoder, variables
    self.mesh: Mesh | None = None
    for leaf in jax.tree.leaves(variables['params']):
      sharding = getattr(leaf, 'sharding', None)
      mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
      if isinstance(mesh, Mesh) and mesh.size > 1:
        self.mesh = mesh
        break

  def on_mesh(self) -> Any:
    """A context in which the mesh is set, if there is one."""
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

  def place(self, tree: Any) -> Any:
    """Puts arrays whole on every device of the mesh, as the results of what is compiled are."""
    mesh = self.mesh
    if mesh is None:
      return tree
    whole_on = lambda x: NamedSharding(mesh, PartitionSpec(*(None,) * x.ndim))  # noqa: E731
    return jax.tree.map(lambda x: jax.device_put(x, whole_on(x)), tree)

  def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of decoder, variables and more."""
    with self.on_mesh():
      return function(self.decoder, self.variables, *arguments)

  def caches(self, batch: int, slots: int, spare: int = 0) -> Any:
    """Empty caches; see `fresh_caches`."""
    with self.on_mesh():
      return fresh_caches(self.decoder, batch, slots, spare)

  def choose(self, sampler: Sampler, logits: jax.Array, seed: int, index: int) -> jax.Array:
    """Tokens [B] drawn from logits [B, V]."""
    with self.on_mesh():
      return jit_choose(sampler, logits, np.uint32(seed), np.uint32(index))


def whole(tree: Any) -> Any:
  """Keeps arrays whole on every device of the mesh, if one is set.

  Without it the compiler would choose a layout for the cache that the next step does not expect.
  """
  return jax.tree.map(lambda x: Rules().constrain(x, (None,) * x.ndim), tree)
