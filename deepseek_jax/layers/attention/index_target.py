"""The attention that an indexer learns to stand for, and how far it is from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.layers.attention.chosen import Chosen
from deepseek_jax.layers.attention.indexer import Index
from deepseek_jax.layers.attention.latent import Latent, Queries
from deepseek_jax.layers.attention.spread import (
  Whole,
  key_facts,
  query_facts,
  seen_of,
  with_all_keys,
)
from deepseek_jax.layers.context import Context
from deepseek_jax.ops.attention.divergence import selected_divergence, whole_divergence
from deepseek_jax.ops.attention.gathered import KeySets
from deepseek_jax.ops.attention.reference import MASKED, Seen, visible


class Attended(NamedTuple):
  """What attention is made of.

  Attributes:
    query: the queries, not made yet.
    key: latent [B, S, C] and rotated [B, S, R].
    up_key: [C, H, nope] what makes keys of latents.
  """

  query: Queries
  key: tuple[jax.Array, jax.Array]
  up_key: jax.Array


def index_divergence(
  config: Latent,
  target: Attended,
  index: Index,
  seen: Seen,
  context: Context,
  chosen: Chosen | None,
  mass: jax.Array | None,
) -> jax.Array:
  """Returns the indexer's KL of every query over what it attends to, [B, T] float32.

  Args:
    config: sizes and scale.
    target: the attention that the index stands for.
    index: of the same tokens.
    seen: who sees whom.
    context: facts about the tokens.
    chosen: what was attended to; None is everything.
    mass: [B, T, m] attention to it.
  """
  query, facts, facts_of_keys = target.query, query_facts(seen), key_facts(seen)
  of_queries = index.query, index.weights
  if chosen is not None and mass is not None:
    block, hidden = chosen.block, chosen.seen is not None

    def selected(own, keys, everywhere):
      del everywhere
      (scorers, weights), mass, indices, facts = own
      sets = KeySets(indices, block, seen_of(facts, keys[1]) if hidden else None)
      return selected_divergence(scorers, keys[0], weights, sets, mass)

    own = of_queries, mass, chosen.indices[0], facts
    return with_all_keys(selected, own, (index.key, facts_of_keys), Whole(), context)

  def whole(own, keys, everywhere):
    (scorers, weights), source, positions, facts = own
    index_key, key, facts_of_keys = keys
    seen = seen_of(facts, facts_of_keys)
    matrix, up_key = everywhere.weights
    part = Attended(Queries(source, matrix, positions), key, up_key)

    def attention(rows: jax.Array) -> jax.Array:
      return summed_attention(config, part, seen, rows)

    return whole_divergence(attention, scorers, index_key, weights, seen)

  own = of_queries, query.source, query.positions, facts
  keys = index.key, target.key, facts_of_keys
  return with_all_keys(whole, own, keys, Whole((query.matrix, target.up_key)), context)


def summed_attention(config: Latent, target: Attended, seen: Seen, rows: jax.Array) -> jax.Array:
  """Returns dense attention of some queries, summed over heads, [B, n, S] float32.

  Args:
    config: sizes and scale.
    target: all T queries, and the keys.
    seen: who sees whom.
    rows: [n] int32 which queries.
  """
  key = target.key
  nope, rope = target.query.rows(rows).make(config)
  inner = jnp.einsum('bthk,chk->bthc', nope, target.up_key)
  scores = jnp.einsum('bthc,bsc->bhts', inner, key[0], preferred_element_type=jnp.float32)
  scores += jnp.einsum('bthr,bsr->bhts', rope, key[1], preferred_element_type=jnp.float32)
  mask = visible(*seen.at(rows))
  scores = jnp.where(mask[:, None], scores * config.softmax_scale, MASKED)
  return jnp.sum(jax.nn.softmax(scores, axis=-1), axis=1)
