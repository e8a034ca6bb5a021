"""Attention of each token to the few tokens that it scores highest."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.chosen import Chosen, ChosenAttention
from deepseek_jax.layers.attention.interface import Cache
from deepseek_jax.layers.attention.latent import (
  LATENT_CACHE_AXES,
  Latent,
  LatentCache,
  empty_latent_cache,
)
from deepseek_jax.layers.attention.spread import choose_spread
from deepseek_jax.layers.context import MEDIA, TEXT, Context
from deepseek_jax.layers.context_parallel import Order
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.attention.select import select_nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK(Latent):
  """Latent attention of every token to the `top_k` visible tokens that its heads score highest.

  A token has one set for all of its heads, chosen by the mean of their own scores. In the latent
  space that mean is a single product of C + R channels, so that looking at all pairs costs
  2 (C + R) FLOPs each, 1 / H of what absorbed scores cost; it still grows with the square of the
  length. Nothing is learnt for the choice, and no gradient flows through it.

  Attributes:
    top_k: tokens that each token attends to; where it sees fewer, it attends to them all.

  Source: Gupta et al., arXiv 2106.06899, section 2, where every head chooses for itself.
  """

  top_k: int = 32

  def __post_init__(self):
    super().__post_init__()
    if self.top_k < 1:
      raise ConfigError(f'`top_k` is {self.top_k}; expected 1 or more')

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return TopKAttention(self, name=name)

  def visible_tokens(self, length: int) -> float:
    """Mean number of tokens that a token of a `length`-token segment attends to."""
    return sum(min(t + 1, self.top_k) for t in range(length)) / length

  def mixing_flops(self, length: int) -> float:
    """Forward FLOPs a token: one product with every visible token, and absorbed attention."""
    per_pair = 2 * self.heads * (2 * self.latent + self.rope_dim)
    choice = 2 * (self.latent + self.rope_dim) * (length + 1) / 2
    return choice + per_pair * self.visible_tokens(length)

  def check_shared(self, tokens: int, order: Order) -> list[str]:
    """Returns nothing: keys come from everywhere, and positions say which are seen."""
    del tokens, order
    return []

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> LatentCache:
    """Returns an empty cache of `length` slots; a token's slot is its position."""
    del spare  # A later token is not seen, and is written over when its position comes again.
    return empty_latent_cache(self, batch, length, dtype)

  def cache_axes(self) -> LatentCache:
    """Returns the logical axes of the cache."""
    return LATENT_CACHE_AXES


class TopKAttention(ChosenAttention):
  """[B, T, D] -> [B, T, D], over the cache of MLA."""

  config: TopK

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context, cache: Cache | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Mixes `x` [B, T, D]; see `AttentionConfig.build`."""
    c = self.config
    query = self.unmade_queries(x, context)
    key = self.latents(x, context)
    up = self.up(x.dtype)
    seen, modality = context.own(), context.modality
    if cache is not None:
      cache, tokens, modality = self.remember(cache, key, context)
      key = (tokens.latent, tokens.rope_key)
      seen = Seen(context.positions, tokens.positions)
    # Σ_h q_h · k_h: the heads' queries are summed in the latent space, where their keys are one.
    nope, rope = query.make(c)
    inner = jnp.einsum('bthk,chk->btc', nope, up[..., : c.nope_dim])
    whole = jnp.concatenate([inner, jnp.sum(rope, axis=2)], axis=-1)
    key = (key[0].astype(x.dtype), key[1].astype(x.dtype))
    found = []
    for own, top_k in self.budgets(modality, seen):

      def select(whole, key, seen, ordered, top_k=min(top_k, key[0].shape[1])):
        rows = jnp.concatenate(key, axis=-1)
        return select_nearest(whole, rows, seen, top_k, ordered=ordered)

      if cache is None:
        found.append(choose_spread(select, whole, key, own, context))
      else:
        found.append(select(whole, key, own, False))
    matrices = up, self.output_matrix(x.shape[-1], x.dtype)
    y, _ = self.mix_chosen(query, key, matrices, Chosen((jnp.concatenate(found, -1),)), context)
    return y, cache

  def remember(
    self, cache: Any, key: tuple[jax.Array, jax.Array], context: Context
  ) -> tuple[Any, LatentCache, jax.Array | None]:
    """Writes T tokens; returns the cache, its latents, and of which modality each is [B, S]."""
    cache = cache.write(context.slots(cache.positions.shape[1]), *key, context.positions)
    return cache, cache, None

  def budgets(self, modality: jax.Array | None, seen: Seen) -> list[tuple[Seen, int]]:
    """Returns which keys are chosen among, and how many of them, for each choice."""
    del modality
    return [(seen, self.config.top_k)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
  """How many keys of each kind of media a token attends to, at most.

  Attributes:
    image: of pictures.
    video: of clips.
    sound: of sounds.
    points: of clouds of points.
  """

  image: int = 16
  video: int = 16
  sound: int = 16
  points: int = 16

  def __post_init__(self):
    errors = [
      f'`{name}` is {count}; expected 0 or more keys'
      for name, count in vars(self).items()
      if count < 0
    ]
    if errors:
      raise ConfigError(errors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModalityTopK(TopK):
  """`TopK` with a budget of its own for each modality: what is shown displaces no word.

  One choice a modality, each among its own keys; text alone is `TopK`.

  Attributes:
    top_k: text tokens that each token attends to.
    shown: embeddings of media that each token attends to, by kind.
  """

  shown: Shown = Shown()

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return ModalityTopKAttention(self, name=name)

  # What a cache holds is more than that of its base.
  def empty_cache(  # type: ignore[override]
    self, batch: int, length: int, dtype: DTypeLike, spare: int = 0
  ) -> 'ModalityCache':
    """Returns an empty cache of `length` slots; a token's slot is its position."""
    tokens = super().empty_cache(batch, length, dtype, spare)
    return ModalityCache(tokens, jnp.zeros((batch, length), jnp.int32))

  def cache_axes(self) -> 'ModalityCache':  # type: ignore[override]
    """Returns the logical axes of the cache."""
    return ModalityCache(LATENT_CACHE_AXES, ('batch', 'cache_length'))  # type: ignore[arg-type]


@struct.dataclass
class ModalityCache:
  """What is remembered of each token, and what it is.

  Attributes:
    tokens: the latent cache.
    modality: [B, S] int32, see `MODALITIES`.
  """

  tokens: LatentCache
  modality: jax.Array


class ModalityTopKAttention(TopKAttention):
  """[B, T, D] -> [B, T, D], with a choice for each modality."""

  config: ModalityTopK

  def remember(
    self, cache: ModalityCache, key: tuple[jax.Array, jax.Array], context: Context
  ) -> tuple[ModalityCache, LatentCache, jax.Array | None]:
    """Writes T tokens and their modality; see `TopKAttention`."""
    slots = context.slots(cache.modality.shape[1])
    tokens = cache.tokens.write(slots, *key, context.positions)
    new = jnp.full_like(slots, TEXT) if context.modality is None else context.modality
    rows = jnp.arange(slots.shape[0])[:, None]
    modality = cache.modality.at[rows, slots].set(new, mode='drop')
    return ModalityCache(tokens, modality), tokens, modality

  def budgets(self, modality: jax.Array | None, seen: Seen) -> list[tuple[Seen, int]]:
    """Returns each modality's own keys, and how many of them are chosen."""
    c = self.config
    if modality is None:
      return [(seen, c.top_k)]
    counts = {TEXT: c.top_k} | {MEDIA[name]: count for name, count in vars(c.shown).items()}
    return [
      (seen._replace(key_positions=jnp.where(modality == kind, seen.key_positions, -1)), count)
      for kind, count in counts.items()
      if count
    ]
