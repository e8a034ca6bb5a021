"""Choosing experts: scores, group-limited top-k, weights, loads."""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp

RULED_OUT = -1e9
"""The logit of an expert that may not be chosen; finite, for the sake of gradients."""


def rule_out(logits: jax.Array, allowed: jax.Array | None) -> jax.Array:
  """Gives experts that may not be chosen a logit whose softmax, sigmoid and softplus are 0.

  Args:
    logits: [N, E] float32.
    allowed: [E] bool; None is all.
  """
  return logits if allowed is None else jnp.where(allowed, logits, RULED_OUT)


def sqrt_softplus(logits: jax.Array) -> jax.Array:
  """√ln(1 + eˣ) of each logit [N, E] float32.

  Where eˣ is nothing in float32 the gradient is 0, as it nearly is; of √0 it would be infinite.

  Source: DeepSeek-V4, arXiv 2606.19348, its section on mixture of experts.
  """
  value = jax.nn.softplus(logits)
  some = value > 0
  return jnp.where(some, jnp.sqrt(jnp.where(some, value, 1.0)), 0.0)


def best_two(grouped: jax.Array) -> jax.Array:
  """Scores each group of experts [N, G, S] by the sum of its two best, [N, G].

  Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2 (node-limited routing).
  """
  best = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0]
  total = jnp.sum(jnp.where(best == -jnp.inf, 0.0, best), axis=-1)
  return jnp.where(best[..., 0] == -jnp.inf, -jnp.inf, total)


def best_one(grouped: jax.Array) -> jax.Array:
  """Scores each group of experts [N, G, S] by its best, [N, G].

  Source: DeepSeek-V2, arXiv 2405.04434, section 2.2.2 (device-limited routing).
  """
  return jnp.max(grouped, axis=-1)


def group_limited_top_k(
  scores: jax.Array,
  selection: jax.Array,
  *,
  groups: int = 1,
  kept_groups: int = 1,
  top_k: int,
  group_score: Callable[[jax.Array], jax.Array] = best_two,
  allowed: jax.Array | None = None,
  count: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Picks `top_k` experts a token from the `kept_groups` best groups of experts.

  Groups that are dropped, and experts that are not allowed, are masked with −inf, not with 0: a
  biased selection score may be negative. A token with fewer experts left than choices gives the
  choices that are over to nobody, and so it does with those after the first `count`.

  Args:
    scores: [N, E] float32 affinities; what the weights are taken from.
    selection: [N, E] float32 scores that decide (affinities plus bias).
    groups: number of equal groups of neighbouring experts.
    kept_groups: groups a token may choose from.
    top_k: experts K a token goes to.
    group_score: turns selection scores [N, G, E / G] into scores of groups [N, G].
    allowed: [E] bool, experts that may be chosen; None is all.
    count: [] int32, choices that count; None is all K.

  Returns:
    experts [N, K] int32, best first, where E is nobody; and the scores [N, K] float32 of those
    experts, 0 for nobody.

  Source: DeepSeek-V2, arXiv 2405.04434, section 2.2.2; DeepSeek-V3, arXiv 2412.19437, section
    2.1.2.
  """
  selection = jax.lax.stop_gradient(selection)
  if allowed is not None:
    selection = jnp.where(allowed, selection, -jnp.inf)
  if groups > 1:
    grouped = einops.rearrange(selection, 'n (g e) -> n g e', g=groups)
    kept = jax.lax.top_k(group_score(grouped), kept_groups)[1]
    inside = jnp.any(kept[:, :, None] == jnp.arange(groups), axis=1)
    selection = einops.rearrange(
      jnp.where(inside[:, :, None], grouped, -jnp.inf), 'n g e -> n (g e)'
    )
  best, experts = jax.lax.top_k(selection, top_k)
  picked = jnp.take_along_axis(scores, experts, axis=-1)
  if allowed is None and count is None:
    return experts, picked
  chosen = best > -jnp.inf
  if count is not None:
    chosen &= jnp.arange(top_k) < count
  return jnp.where(chosen, experts, scores.shape[-1]), jnp.where(chosen, picked, 0.0)


def renormalise(picked: jax.Array, scale: float) -> jax.Array:
  """Turns the scores of the chosen experts [N, K] into weights that sum to `scale`.

  Source: DeepSeek-V3, arXiv 2412.19437, equation 13.
  """
  return picked / (jnp.sum(picked, axis=-1, keepdims=True) + 1e-20) * scale


def chosen_mask(experts: jax.Array, count: int) -> jax.Array:
  """Turns chosen experts [N, K] into a float32 table [N, E] of zeros and ones; E is nobody."""
  return jnp.sum(jax.nn.one_hot(experts, count, dtype=jnp.float32), axis=1)


def expert_load(experts: jax.Array, real: jax.Array, count: int) -> jax.Array:
  """Counts the tokens that chose each expert.

  Args:
    experts: [N, K] int32; E is nobody.
    real: [N] bool; padding counts for nothing.
    count: number of experts E.

  Returns:
    [E] float32 counts; they sum to K × number of real tokens, less the choices that are nobody's.
  """
  chosen = jnp.where(real[:, None], experts, count)

  def scattered(chosen):
    return jnp.zeros(count, jnp.float32).at[chosen].add(1.0, mode='drop')

  def compared(chosen):
    return jnp.sum(chosen_mask(chosen, count), axis=0)

  # Comparing costs N·K·E, which a CPU feels; where many cores compare at once, additions to one
  # place that wait for each other are what costs.
  return jax.lax.platform_dependent(chosen, cpu=scattered, default=compared)


def load_by_group(
  experts: jax.Array, real: jax.Array, group: jax.Array, groups: int, count: int
) -> jax.Array:
  """Counts the tokens of each group that chose each expert.

  Args:
    experts: [N, K] int32; E is nobody.
    real: [N] bool; padding counts for nothing.
    group: [N] int32 which group each token is of.
    groups: number of groups G.
    count: number of experts E.

  Returns:
    [G, E] float32 counts; their sum over groups is `expert_load`.
  """
  place = jnp.where(experts < count, group[:, None] * count + experts, groups * count)
  return expert_load(place, real, groups * count).reshape(groups, count)


def preference(chosen: jax.Array, count: int) -> jax.Array:
  """Turns experts in order of preference into selection scores.

  Args:
    chosen: [N, K] int32, different experts in each row, best first.
    count: number of experts E.

  Returns:
    [N, E] float32: the chosen ones first; then the others in cyclic order after the first one.
  """
  experts = jnp.arange(count)
  places = jnp.arange(chosen.shape[1], 0, -1)
  rank = jnp.sum(jnp.where(chosen[:, :, None] == experts, places[:, None], 0), axis=1)
  after = (experts - chosen[:, :1]) % count
  return jnp.where(rank > 0, rank, -after).astype(jnp.float32)


def deal(
  tokens: int,
  experts: int,
  top_k: int,
  allowed: jax.Array | None = None,
  count: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Deals experts to tokens in turn, as cards, so that all get the same number.

  Args:
    tokens: number of tokens N.
    experts: number of experts E.
    top_k: choices K of a token.
    allowed: [E] bool, experts that are dealt; None is all.
    count: [] int32, choices that count; None is all K.

  Returns:
    experts [N, K] int32, where E is nobody, and [] int32, how many choices of a token count.
  """
  order, open_experts = jnp.arange(experts), jnp.int32(experts)
  if allowed is not None:
    order, open_experts = jnp.argsort(~allowed, stable=True), jnp.sum(allowed, dtype=jnp.int32)
  each = jnp.minimum(top_k if count is None else count, open_experts)
  place = jnp.arange(top_k)
  turn = (jnp.arange(tokens)[:, None] * each + place) % jnp.maximum(open_experts, 1)
  return jnp.where(place < each, order[turn], experts).astype(jnp.int32), each
