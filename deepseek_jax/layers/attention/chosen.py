"""Latent attention to chosen keys: what the sparse kinds share."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.layers.attention.latent import Latent, LatentAttention, Queries, expand_latents
from deepseek_jax.layers.attention.shards import attend_chosen_sharded
from deepseek_jax.layers.attention.spread import (
  Whole,
  key_facts,
  query_facts,
  seen_of,
  with_all_keys,
)
from deepseek_jax.layers.context import Context
from deepseek_jax.ops.attention.blocks import Extras
from deepseek_jax.ops.attention.gathered import KeySets
from deepseek_jax.ops.attention.pieces import cut, joined
from deepseek_jax.ops.attention.reference import Seen

CHUNK = 1024
"""Queries that are in the latent space at once: there they are several times as large."""
EXPANDED = 8192
"""Keys up to which keys and values of all heads are made; beyond they would fill the memory."""


class Chosen(NamedTuple):
  """The keys that T queries attend to.

  Attributes:
    indices: [B, N, m] int32 keys of consecutive blocks of queries, in one array or in several with
      different m; -1 is none.
    block: queries of a block; the last may have fewer.
    seen: which of its block's keys a query may see; None where it may see all.
  """

  indices: tuple[jax.Array, ...]
  block: int = 1
  seen: Seen | None = None


class ChosenAttention(LatentAttention):
  """Projections of latent attention, and attention to keys that a kind has chosen."""

  config: Latent

  def mix_chosen(
    self,
    query: Queries,
    key: tuple[jax.Array, jax.Array],
    matrices: tuple[jax.Array, jax.Array],
    chosen: Chosen,
    context: Context,
    bias: jax.Array | None = None,
    mass: bool = False,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Attends from T queries to the keys chosen for them.

    Args:
      query: the queries, which are made where they are needed.
      key: the pair that `latents` returns, or what a cache remembers of it.
      matrices: what the methods `up` and `output_matrix` return. The heads' outputs are projected
        at once: together they are several times as large as the result.
      chosen: who attends to what.
      context: facts about the T tokens.
      bias: [B, S] float32 added to every score of a key, or None.
      mass: whether the weights of the chosen keys are wanted; `chosen` then has one array.

    Returns:
      [B, T, D]; and the softmax weights of the chosen keys, summed over heads, [B, T, m] float32,
      or None.
    """
    c, dtype = self.config, matrices[0].dtype
    key = (key[0].astype(dtype), key[1].astype(dtype))
    seen = chosen.seen
    # Where devices share the row, latents are what travels.
    own = query.source, query.positions, chosen.indices, None if seen is None else query_facts(seen)
    keys = key, bias, None if seen is None else key_facts(seen)

    def mix(own, keys, whole):
      source, positions, indices, facts = own
      key, bias, facts_of_keys = keys
      matrix, matrices = whole.weights
      query = Queries(source, matrix, positions)
      seen = None if facts is None else seen_of(facts, facts_of_keys)
      attend = functools.partial(
        attend_chosen_sharded,
        rules=context.rules,
        scale=c.softmax_scale,
        extras=Extras(key_bias=bias),
        mass=mass,
      )
      return _mix_parts(c, query, key, matrices, Chosen(indices, chosen.block, seen), attend)

    return with_all_keys(mix, own, keys, Whole((query.matrix, matrices)), context)


def _mix_parts(c: Latent, query: Queries, key, matrices, chosen: Chosen, attend):
  """What `mix_chosen` returns, part by part of the chosen keys."""
  tokens, keys = query.source.shape[1], key[0].shape[1]
  # Devices that share the row each have fewer queries than there are keys to make.
  form = _expanded if chosen.block > 1 and keys <= min(tokens, EXPANDED) else _absorbed
  found, first = [], 0
  for indices in chosen.indices:
    last = min(first + indices.shape[1] * chosen.block, tokens)
    rows = slice(first, last)
    seen = None if chosen.seen is None else chosen.seen.at(rows)
    sets = KeySets(indices, chosen.block, seen)
    found.append(form(c, query.rows(rows), key, matrices, sets, attend))
    first = last
  return jnp.concatenate([y for y, _ in found], axis=1), found[0][1]


def _expanded(c: Latent, query: Queries, key, matrices, sets: KeySets, attend):
  """Keys and values of every head: the fewest FLOPs a pair."""
  up, output = matrices
  whole_key, value = expand_latents(c, key, up)
  whole = jnp.concatenate(query.make(c), axis=-1)
  found = attend(whole, whole_key, value, sets)
  return jnp.einsum('bthv,hvd->btd', found.out, output), found.mass


def _absorbed(c: Latent, query: Queries, key, matrices, sets: KeySets, attend):
  """Queries go to the latent space, a chunk at a time: the least memory."""
  rows = jnp.concatenate(key, axis=-1)
  up, output = matrices
  up_key, up_value = up[..., : c.nope_dim], up[..., c.nope_dim :]
  seen, block = sets.seen, sets.block

  def part(query: Queries, sets: KeySets):
    nope, rope = query.make(c)
    whole = jnp.concatenate([jnp.einsum('bthk,chk->bthc', nope, up_key), rope], axis=-1)
    found = attend(whole, rows, c.latent, sets)
    heads = jnp.einsum('bthc,chv->bthv', found.out, up_value)
    return jnp.einsum('bthv,hvd->btd', heads, output), found.mass

  tokens = query.source.shape[1]
  if tokens <= CHUNK:
    return part(query, sets)
  size = max(CHUNK // block, 1) * block

  # The queries of a chunk are made again for the gradient, never kept.
  @jax.checkpoint
  def one(piece):
    source, positions, facts, indices = piece
    own = None
    if seen is not None:
      own = seen._replace(query_positions=facts[0], query_segments=facts[1])
    return part(Queries(source, query.matrix, positions), KeySets(indices, block, own))

  facts = None if seen is None else (seen.query_positions, seen.query_segments)
  of_queries = (query.source, query.positions, facts)
  pieces = (
    *jax.tree.map(lambda x: cut(x, size), of_queries),
    cut(sets.indices, size // block, -1),
  )
  return jax.tree.map(lambda x: joined(x, tokens), lax.map(one, pieces))
