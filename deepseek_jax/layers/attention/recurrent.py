"""Attention inside segments, and a memory of fixed size that stands for all that is earlier."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.interface import Cache, in_order_only
from deepseek_jax.layers.attention.latent import (
  LATENT_CACHE_AXES,
  Latent,
  LatentAttention,
  LatentCache,
  empty_latent_cache,
)
from deepseek_jax.layers.context import IMAGE, TEXT, Context
from deepseek_jax.layers.context_parallel import Order
from deepseek_jax.layers.weights import vector, weight
from deepseek_jax.ops.attention.recurrent import (
  Blocks,
  Keys,
  Pool,
  empty_pool,
  find_blocks,
  join_keys,
  pool_rows,
)
from deepseek_jax.ops.attention.reference import Seen

FADING = 2.0**-6, 2.0**2
"""What exponents lose in a segment at first, from the slot that remembers longest to the one that
forgets fastest: of 64 segments before, a weight is left of 1 / e; of a quarter of one, likewise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
  """How many slots of memory each modality has; a slot pools the tokens of its own alone.

  Tokens of a modality without a slot are forgotten when their segment ends.

  Attributes:
    text: slots for text, and for all tokens where nobody says what they are.
    image: slots for what stands in the places of pictures.
  """

  text: int = 16
  image: int = 0

  def __post_init__(self):
    errors = [
      f'`{name}` is {slots}; expected 0 or more slots'
      for name, slots in vars(self).items()
      if slots < 0
    ]
    if not errors and not self.total:
      errors.append('`text` and `image` are 0; a memory has at least 1 slot')
    if errors:
      raise ConfigError(errors)

  @property
  def total(self) -> int:
    """Slots M of all modalities."""
    return self.text + self.image

  def takes(self, modality: jax.Array | None) -> jax.Array:
    """Says which slots pool which of the tokens [B, T]: bool [B, T, M], or [M] for all alike."""
    own = np.repeat([TEXT, IMAGE], [self.text, self.image])
    if modality is None:
      return jnp.asarray(own == TEXT)
    # All that is shown and not read is pooled alike.
    return jnp.minimum(modality, IMAGE)[:, :, None] == own

  def fading(self) -> np.ndarray:
    """Returns what exponents lose in a segment at first, [M] float64."""
    return np.concatenate([np.geomspace(*FADING, slots) for slots in (self.text, self.image)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recurrent(Latent):
  """Latent attention inside segments of a document, and to a memory of all that came before.

  The document is cut every `size` tokens. A token sees those up to itself in its own segment, and M
  slots: each is a mean of the latents of all tokens before the segment, weighed by how well they
  match what the slot looks for and by how long ago they were, at a rate that the slot learns. Time
  grows with size + M a token, and what a cache holds does not grow at all. The mean can be
  continued anywhere, so that a document may be read in whatever pieces: the cache is all of it.

  A slot is a key and a value like a token, but for the rotated channels: they are zero, so that its
  score does not depend on where the query is.

  Attributes:
    size: tokens of a segment.
    memory: slots by modality.

  Source: segments and a carried summary: Dai et al., arXiv 1901.02860, section 3.2, and Munkhdalai
    et al., arXiv 2404.07143, section 2; rates of forgetting: Sun et al., arXiv 2307.08621,
    section 2.
  """

  size: int = 128
  memory: Slots = Slots()

  def __post_init__(self):
    super().__post_init__()
    if self.size < 1:
      raise ConfigError(f'`size` is {self.size}; a segment holds at least 1 token')

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return RecurrentAttention(self, name=name)

  def visible_tokens(self, length: int) -> float:
    """Mean number of tokens and slots that a token of a `length`-token segment attends to."""
    place = np.arange(length)
    return float(np.mean(place % self.size + 1 + (place >= self.size) * self.memory.total))

  def mixing_flops(self, length: int) -> float:
    """Forward FLOPs a token over `length` causal tokens, on average.

    Pairs; the sum over tokens that a slot is (its scores are counted from the weights); and keys
    and values of the slots at every boundary.
    """
    slots = self.memory.total
    up = 2 * self.latent * self.heads * (self.nope_dim + self.value_dim)
    made = (length - 1) // self.size / length
    return super().mixing_flops(length) + slots * (2 * self.latent + up * made)

  def check_shared(self, tokens: int, order: Order) -> list[str]:
    """Returns what is wrong with such an order of the tokens of a row, as messages."""
    del tokens
    return in_order_only(order, 'the tokens of a segment')

  def empty_cache(
    self, batch: int, length: int, dtype: DTypeLike, spare: int = 0
  ) -> 'RecurrentCache':
    """Returns an empty cache, of the same size whatever `length` is.

    Raises:
      ConfigError: `spare` is not 0.
    """
    if spare:
      raise ConfigError(
        'Recurrent cannot take tokens back: its memory is a running sum of all that it has read'
      )
    slots = self.memory.total
    pool = empty_pool(batch, slots, self.latent)
    seen = empty_latent_cache(self, batch, self.size + slots, dtype)
    return RecurrentCache(seen, *pool)

  def cache_axes(self) -> 'RecurrentCache':
    """Returns the logical axes of the cache."""
    return RecurrentCache(
      seen=LATENT_CACHE_AXES,
      top=('batch', None),  # type: ignore[arg-type]
      total=('batch', None),  # type: ignore[arg-type]
      mixed=('batch', None, None),  # type: ignore[arg-type]
    )


@struct.dataclass
class RecurrentCache:
  """What the next token may see, and what the memory will be made of.

  Attributes:
    seen: [B, size + M, …] the tokens of the last one's segment, each in the slot of its place
      there; then the memory of that segment, at the position of its boundary.
    top: [B, M] float32; `ops.attention.recurrent.Pool` of all tokens so far.
    total: [B, M] float32.
    mixed: [B, M, C] float32.
  """

  seen: LatentCache
  top: jax.Array
  total: jax.Array
  mixed: jax.Array


class RecurrentAttention(LatentAttention):
  """[B, T, D] -> [B, T, D], over a cache of one segment and a memory.

  With a cache, a row goes on with the document that the cache has read unless it begins with a
  token at position 0; other documents may follow in it.
  """

  config: Recurrent

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    c, positions = self.config, jnp.asarray(context.positions)
    query = self.queries(x, context)
    tokens = self.latents(x, context)
    blocks = find_blocks(positions, context.segments, c.size)
    with jax.named_scope('pool'):
      *memory, pool = self.pool(tokens[0], context, blocks, cache)
    new = join_keys(tokens, positions, blocks, (memory[0], memory[1]), c.size)
    key, key_positions, key_runs = new[:2], new.positions, new.runs
    if cache is not None:
      # What is held is of the first token's segment, unless that one begins another.
      held = jnp.where(positions[:, :1] % c.size > 0, 0, -1)
      key = (_extend(cache.seen.latent, new.latent), _extend(cache.seen.rope_key, new.rope_key))
      key_positions = _extend(cache.seen.positions, key_positions)
      key_runs = _extend(jnp.broadcast_to(held, cache.seen.positions.shape), key_runs)
      cache = RecurrentCache(self.keep(cache.seen, held, new, context, blocks), *pool)
    seen = Seen(positions, key_positions, blocks.runs, key_runs)
    return self.project(self.mix_seen(query, key, seen, context), x.shape[-1]), cache

  def pool(
    self, latent: jax.Array, context: Context, blocks: Blocks, cache: Cache | None
  ) -> tuple[jax.Array, jax.Array, Pool]:
    """Returns what `pool_rows` does of the latents [B, T, C]."""
    c = self.config
    slots = c.memory.total
    # float32: the scores are exponents, and few slots stand for many tokens.
    w = weight(self, 'slot_query', (c.latent, slots), ('latent', None), dtype=jnp.float32)
    start = np.log(np.expm1(c.memory.fading()))
    fading = jax.nn.softplus(vector(self, 'fading', start))
    logits = jnp.einsum('btc,cm->btm', latent.astype(jnp.float32), w)
    logits += fading * (jnp.asarray(context.positions) % c.size / c.size)[..., None]
    takes = jnp.broadcast_to(c.memory.takes(context.modality), logits.shape)
    before = empty_pool(latent.shape[0], slots, c.latent)
    if cache is not None:
      before = Pool(cache.top, cache.total, cache.mixed)
    return pool_rows(latent, logits, takes, fading, blocks, before)

  def keep(
    self, seen: LatentCache, held: jax.Array, new: Keys, context: Context, blocks: Blocks
  ) -> LatentCache:
    """Returns what of the old and the new [B, S] the token after the last may see.

    Args:
      seen: the old.
      held: [B, 1] run that the old is of; -1 where it is of none of this row.
      new: the row's keys.
      context: facts about the T tokens.
      blocks: where they lie.
    """
    runs = jnp.where(context.real, blocks.runs, -1)
    last = jnp.max(runs, axis=1, keepdims=True)
    # A row of padding alone changes nothing.
    same = (held == last) | (last < 0)
    seen = dataclasses.replace(seen, positions=jnp.where(same, seen.positions, -1))
    written = (new.positions >= 0) & (new.runs == last)
    slots = jnp.where(written, new.places, seen.positions.shape[1])
    return seen.write(slots, new.latent, new.rope_key, new.positions)


def _extend(old: jax.Array, new: jax.Array) -> jax.Array:
  """Puts new keys [B, T, …] after remembered ones [B, S, …], in the dtype of the latter."""
  return jnp.concatenate([old, new.astype(old.dtype)], axis=1)
