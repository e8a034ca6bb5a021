"""Choosing the next token from logits: pure functions on float arrays [B, V].

The `keep_*` functions set the logits of tokens that may not be drawn to minus infinity and leave
the others as they are, so that they can be chained in any order before `sample`. Every one of them
keeps at least the most likely token. Logits become float32 first: in bfloat16, with its 8 bits,
neighbouring logits of a large vocabulary are equal and cumulative sums of probabilities stall.
"""

import jax
import jax.numpy as jnp


def apply_temperature(logits: jax.Array, temperature: jax.typing.ArrayLike) -> jax.Array:
  """Divides logits: above 1 makes the draw more even, below 1 more certain.

  Args:
    logits: float [B, V].
    temperature: above 0; a scalar, or [B, 1] for one temperature a row.

  Returns:
    float32 [B, V].
  """
  return logits.astype(jnp.float32) / temperature


def keep_top_k(logits: jax.Array, top_k: int) -> jax.Array:
  """Keeps the k most likely tokens, exactly k even among equals (lower ids first).

  Args:
    logits: float [B, V].
    top_k: how many to keep, at least 1; V or more keeps all.

  Returns:
    float32 [B, V], minus infinity where dropped.
  """
  logits = logits.astype(jnp.float32)
  if top_k >= logits.shape[-1]:
    return logits
  _, chosen = jax.lax.top_k(logits, top_k)
  return _keep(logits, chosen, jnp.ones(chosen.shape, bool))


def keep_top_p(logits: jax.Array, top_p: float) -> jax.Array:
  """Keeps the nucleus: the fewest most likely tokens whose probabilities sum to at least p.

  Args:
    logits: float [B, V].
    top_p: the mass to keep, in (0, 1]; 1 keeps all.

  Returns:
    float32 [B, V], minus infinity where dropped.

  Source: Holtzman et al. (arXiv 1904.09751), section 3.1.
  """
  logits = logits.astype(jnp.float32)
  if top_p >= 1:
    # Rounding lets the running sum reach 1 before the last token; all must stay all.
    return logits
  order = jnp.argsort(-logits, axis=-1, stable=True)
  probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
  # A token stays if those before it fall short of p: the first always does.
  mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
  first = jnp.arange(logits.shape[-1]) == 0
  return _keep(logits, order, (mass_before < top_p) | first)


def keep_min_p(logits: jax.Array, min_p: float) -> jax.Array:
  """Keeps tokens at least `min_p` times as likely as the most likely one.

  Args:
    logits: float [B, V].
    min_p: the ratio, in [0, 1]; 0 keeps all.

  Returns:
    float32 [B, V], minus infinity where dropped.

  Source: Nguyen et al. (arXiv 2407.01082), section 3.
  """
  logits = logits.astype(jnp.float32)
  if min_p <= 0:
    return logits
  threshold = logits.max(axis=-1, keepdims=True) + jnp.log(jnp.float32(min_p))
  return jnp.where(logits >= threshold, logits, -jnp.inf)


def take_best(logits: jax.Array) -> jax.Array:
  """Returns the most likely token of each row (the lowest id among equals).

  Args:
    logits: float [B, V].

  Returns:
    int32 [B].
  """
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(logits: jax.Array, key: jax.Array) -> jax.Array:
  """Draws one token a row with the probabilities softmax(logits).

  Each row has a key of its own, so that what it draws does not depend on the rows beside it.

  Args:
    logits: float [B, V]; minus infinity is never drawn.
    key: typed keys (`jax.random.key`) [B].

  Returns:
    int32 [B].

  Raises:
    ValueError: there is not exactly one typed key a row.
  """
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape != logits.shape[:1]:
    raise ValueError(
      f'sample: found key of dtype {key.dtype} and shape {key.shape}, '
      f'expected typed keys of shape {logits.shape[:1]}, one a row of logits {logits.shape}'
    )
  return jax.vmap(jax.random.categorical)(key, logits.astype(jnp.float32)).astype(jnp.int32)


def accept_drafts(
  target: jax.Array, proposal: jax.Array, drafts: jax.Array, uniforms: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Decides how many drafted tokens stand, and from what the token after them is drawn.

  Draft i stands with probability min(1, target / proposal) if all before it do. The token after
  those that stand is drawn from what the target has more than the proposal, or from the target
  where all stand. Tokens are thus distributed as if each had been drawn from the target.

  Args:
    target: float32 [B, K + 1, V] probabilities of the model: for each draft, and after the last.
    proposal: float32 [B, K, V] what each draft was drawn from.
    drafts: int32 [B, K].
    uniforms: float32 [B, K] numbers in [0, 1) that nothing else depends on.

  Returns:
    How many stand, int32 [B], and float32 [B, V] weights of the token after, whose sum is any
    number above 0.

  Source: Leviathan et al. (arXiv 2211.17192), algorithm 1; Chen et al. (arXiv 2302.01318),
    algorithm 2.
  """
  pick = lambda x: jnp.take_along_axis(x, drafts[..., None], axis=-1)[..., 0]  # noqa: E731
  stands = uniforms * pick(proposal) < pick(target[:, :-1])
  count = jnp.sum(jnp.cumprod(stands.astype(jnp.int32), axis=1), axis=1)
  # After the last draft nothing was proposed: the rest is the target itself.
  proposal = jnp.pad(proposal, ((0, 0), (0, 1), (0, 0)))
  own, other = (
    jnp.take_along_axis(x, count[:, None, None], axis=1)[:, 0] for x in (target, proposal)
  )
  rest = jnp.maximum(own - other, 0.0)
  # Rounding may leave nothing of two distributions that are all but equal.
  return count, jnp.where(jnp.any(rest > 0, axis=-1, keepdims=True), rest, own)


def _keep(logits: jax.Array, tokens: jax.Array, kept: jax.Array) -> jax.Array:
  """Drops every logit but those at `tokens` [B, K] where `kept` [B, K]."""
  rows = jnp.arange(logits.shape[0])[:, None]
  mask = jnp.zeros(logits.shape, bool).at[rows, tokens].set(kept)
  return jnp.where(mask, logits, -jnp.inf)
