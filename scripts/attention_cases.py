"""What bench_attention.py compares: one function a candidate, and one layer of every kind."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
  import jax

WIDTH = 256
FORWARD, BACKWARD = 'forward', 'with backward'


class Case(NamedTuple):
  """A candidate.

  Attributes:
    function: takes `arguments` and then `facts`, and returns one array.
    arguments: what a gradient is taken of.
    facts: what none is taken of.
  """

  function: Callable[..., Any]
  arguments: tuple[Any, ...]
  facts: tuple[Any, ...] = ()


class Ready(NamedTuple):
  """A candidate that is compiled: what to call, and bytes XLA holds for it, if known."""

  call: Callable[[], Any]
  held: int | None = None


def compile_case(case: Case, way: str) -> Ready:
  """Compiles a candidate, forward alone or with the gradient of everything that is learned."""
  import jax

  # Facts are arguments too: as constants they would be computed with while it compiles.
  def total(arguments, facts, grad):
    out, pull = jax.vjp(lambda *a: case.function(*a, *facts), *arguments)
    return out, pull(grad)

  if way == FORWARD:
    arguments = (*case.arguments, *case.facts)
    made = jax.jit(case.function).lower(*arguments).compile()
  else:
    out = jax.eval_shape(case.function, *case.arguments, *case.facts)
    arguments = (case.arguments, case.facts, jax.numpy.ones(out.shape, out.dtype))
    made = jax.jit(total).lower(*arguments).compile()
  memory = made.memory_analysis()
  held = None if memory is None else memory.temp_size_in_bytes
  return Ready(functools.partial(made, *arguments), held)


class Sizes(NamedTuple):
  """Sizes of the arrays of plain attention."""

  batch: int
  length: int
  heads: int
  key_dim: int
  value_dim: int
  dtype: str

  def __str__(self) -> str:
    """As a title."""
    return (
      f'{self.batch} × {self.length} tokens, {self.heads} heads of {self.key_dim} and '
      f'{self.value_dim} channels, {self.dtype}'
    )


def draw(*shape: int, seed: int, dtype: str) -> 'jax.Array':
  """Returns normal numbers."""
  import jax

  return jax.random.normal(jax.random.key(seed), shape, dtype)


def arrays(size: Sizes) -> tuple[Any, Any, Any]:
  """Returns queries and keys [B, T, H, K], values [B, T, H, V]."""
  dims = (size.key_dim, size.key_dim, size.value_dim)
  query, key, value = (
    draw(size.batch, size.length, size.heads, dim, seed=seed, dtype=size.dtype)
    for seed, dim in enumerate(dims)
  )
  return query, key, value


def places(batch: int, length: int) -> 'jax.Array':
  """Returns positions [B, T] int32 from 0."""
  import jax.numpy as jnp

  return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def blocked(size: Sizes, window: tuple[int, int] | None = None) -> Case:
  """Ours, of one document a row."""
  import jax.numpy as jnp

  from deepseek_jax.ops.attention.blocked import attend_blocked
  from deepseek_jax.ops.attention.reference import Seen

  def run(query, key, value, positions, segments):
    seen = Seen(positions, positions, segments, segments)
    scale = size.key_dim**-0.5
    return attend_blocked(query, key, value, seen, scale=scale, window=window, in_order=True)

  positions = places(size.batch, size.length)
  return Case(run, arrays(size), (positions, jnp.ones_like(positions)))


def blocked_up_to(size: Sizes, way: str, short: int) -> Ready:
  """Compiles `blocked` with another limit for rows whose scores are held whole."""
  from deepseek_jax.ops.attention import blocked as module

  usual, module.SHORT = module.SHORT, short
  try:
    return compile_case(blocked(size), way)
  finally:
    module.SHORT = usual


def jax_dense(size: Sizes) -> Case:
  """`jax.nn.dot_product_attention`; it wants values as wide as keys, so they are padded."""
  import jax
  import jax.numpy as jnp

  def run(query, key, value):
    wide = jnp.pad(value, ((0, 0), (0, 0), (0, 0), (0, size.key_dim - size.value_dim)))
    out = jax.nn.dot_product_attention(query, key, wide, is_causal=True)
    return out[..., : size.value_dim]

  return Case(run, arrays(size))


def kinds(heads: int, top_k: int) -> dict[str, Any]:
  """Returns the config of one layer of each kind, of `WIDTH` channels, by name.

  Sizes are those of a small MLA: 64 + 32 channels a head, latent 256, an indexer of 4 × 32; the
  kinds of V4 and NSA have as many heads and see about as much.

  Args:
    heads: query heads; 4 or a multiple.
    top_k: keys k that a query of the sparse kinds attends to.
  """
  from deepseek_jax.layers.attention.bidirectional import Bidirectional
  from deepseek_jax.layers.attention.cross import CrossAttention
  from deepseek_jax.layers.attention.csa import CSA
  from deepseek_jax.layers.attention.gated import Gated, Log, Share
  from deepseek_jax.layers.attention.hca import HCA
  from deepseek_jax.layers.attention.indexer import Indexer
  from deepseek_jax.layers.attention.latent import MLA
  from deepseek_jax.layers.attention.mha import MHA
  from deepseek_jax.layers.attention.nsa import NSA
  from deepseek_jax.layers.attention.recurrent import Recurrent, Slots
  from deepseek_jax.layers.attention.shared_window import SharedWindow
  from deepseek_jax.layers.attention.sparse import DSA, Shared
  from deepseek_jax.layers.attention.top_k import TopK
  from deepseek_jax.layers.attention.window import Window

  latent: dict[str, Any] = {
    'heads': heads,
    'nope_dim': 64,
    'rope_dim': 32,
    'value_dim': 64,
    'latent': 256,
  }
  shared: dict[str, Any] = {
    'heads': heads,
    'head_dim': 96,
    'rope_dim': 32,
    'query_latent': 256,
    'groups': 4,
    'group_dim': 64,
  }
  indexer = Indexer(heads=4, dim=32)
  few: dict[str, Any] = {'top_k': max(top_k // 4, 1), 'index_heads': 4, 'index_dim': 32}
  return {
    'MLA': MLA(**latent),
    'DSA shared': DSA(**latent, indexer=indexer, top_k=top_k, sharing=Shared()),
    'DSA': DSA(**latent, indexer=indexer, top_k=top_k),
    'Gated(Log)': Gated(**latent, keep=Log()),
    'Gated(0.3)': Gated(**latent, keep=Share(share=0.3)),
    'TopK(32)': TopK(**latent, top_k=32),
    'Window': Window(**latent, size=512, sinks=4),
    'Recurrent': Recurrent(**latent, size=512, memory=Slots(text=16)),
    'NSA': NSA(heads=heads, head_dim=96, value_dim=64, blocks=max(top_k // 64, 3)),
    'SharedWindow': SharedWindow(**shared),
    'HCA': HCA(**shared),
    'CSA': CSA(**shared, **few),
    'MHA': MHA(heads=heads, kv_heads=heads // 2, head_dim=64),
    'Bidirectional': Bidirectional(heads=heads, head_dim=64),
    'CrossAttention': CrossAttention(heads=heads, head_dim=64, slots=256),
  }


def layer(config: Any, length: int, dtype: str, learning: bool) -> Case:
  """One layer on one row; a gradient is taken of its weights and of what goes in.

  Args:
    config: its kind and sizes.
    length: tokens T.
    dtype: of what goes in.
    learning: whether the losses that it reports, an indexer's for instance, join what comes out.
  """
  import flax.linen as nn
  import jax
  import jax.numpy as jnp

  from deepseek_jax.layers.context import Memory, text_context

  module = config.build()

  def context(length: int) -> Any:
    memory = Memory(
      values=draw(1, 256, WIDTH, seed=2, dtype=dtype),
      positions=places(1, 256),
      segments=jnp.ones((1, 256), jnp.int32),
    )
    return dataclasses.replace(text_context(jnp.ones((1, length), jnp.int32)), memory=memory)

  few = draw(1, 8, WIDTH, seed=1, dtype=dtype)
  params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), few, context(8)))['params']

  def run(params, x, context):
    if not learning:
      return module.apply({'params': params}, x, context)[0]
    (y, _), reported = module.apply({'params': params}, x, context, mutable=['losses'])
    return y + sum(jnp.sum(part) for part in jax.tree.leaves(reported))

  x = draw(1, length, WIDTH, seed=1, dtype=dtype)
  return Case(run, (params, x), (context(length),))
