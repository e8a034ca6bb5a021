"""Attention maps: who looks at whom."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.hub import Pretrained
from deepseek_jax.lab.picture import Picture, label_pieces
from deepseek_jax.lab.walk import Call, passage, walk
from deepseek_jax.layers.attention.chosen import Chosen, ChosenAttention
from deepseek_jax.layers.attention.latent import LatentAttention
from deepseek_jax.layers.attention.mha import HeadAttention
from deepseek_jax.ops.attention.divergence import membership
from deepseek_jax.ops.attention.reference import MASKED, visible, window_mask

_MIX = inspect.signature(LatentAttention.mix)
_MIX_SEEN = inspect.signature(LatentAttention.mix_seen)
_MIX_OWN = inspect.signature(LatentAttention.mix_own)
_MIX_CHOSEN = inspect.signature(ChosenAttention.mix_chosen)
_ATTEND = inspect.signature(HeadAttention.attend)
_ATTEND_OWN = inspect.signature(HeadAttention.attend_own)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AttentionMaps:
  """The softmax weights of every layer and head on one text.

  Attributes:
    pieces: [T] the tokens as text.
    weights: one array [H, T, T] float32 a layer, query before key; rows sum to 1.
  """

  pieces: tuple[str, ...]
  weights: tuple[np.ndarray, ...]

  def plot(self, layer: int = 0, heads: Sequence[int] | None = None) -> Picture:
    """Draws the heads of one layer, one square each; darker is more.

    Args:
      layer: from 0; negative counts from the last.
      heads: which; None draws all.
    """
    weights = self.weights[layer]
    chosen = range(len(weights)) if heads is None else heads
    columns = min(len(chosen), 4)
    lines = -(-len(chosen) // columns)
    picture = Picture(figsize=(3.1 * columns, 3.2 * lines), layout='constrained')
    grid = picture.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(chosen) :]:
      axes.remove()
    for axes, head in zip(grid.flat, chosen):
      axes.imshow(weights[head], cmap='Blues', vmin=0.0, vmax=1.0)
      axes.set_title(f'layer {layer}, head {head}')
      label_pieces(axes.xaxis, self.pieces, rotation=90)
      label_pieces(axes.yaxis, self.pieces)
    picture.supxlabel('token that is looked at')
    picture.supylabel('token that looks')
    return picture


def attention_maps(model: Pretrained, prompt: str | Sequence[int]) -> AttentionMaps:
  """Reads a text and returns what every head of every layer attends to.

  The model itself keeps no such weights: for the kinds that derive from `LatentAttention` or
  `HeadAttention` they are made again from what `mix`, `mix_seen`, `mix_own`, `attend` or
  `attend_own` is given. A kind of another make shows its own if its module computes them in a
  method called `weigh` that returns [B, H, T, S].

  Args:
    model: the model.
    prompt: a text, which becomes bos and its tokens; or token ids.

  Raises:
    ConfigError: a layer's attention shows no weights in either way, or attends to what is no token,
      such as slots of a memory.
  """
  text = passage(model, prompt)
  weights = []
  blocks = model.decoder.config.layers()
  for visit in walk(model, text.context, read_weights):
    if visit.layer < 0:
      continue
    if len(visit.seen) != 1:
      kind = type(blocks[visit.layer].attention).__name__
      raise ConfigError(
        f'layer {visit.layer}: {kind} gives {len(visit.seen)} maps of attention, expected 1; let '
        'its module derive from LatentAttention or HeadAttention, or compute the weights '
        '[B, H, T, S] in a method `weigh`'
      )
    found = np.asarray(visit.seen[0][0])
    if found.shape[-1] != len(text.pieces):
      kind = type(blocks[visit.layer].attention).__name__
      raise ConfigError(
        f'layer {visit.layer}: {kind} attends to {found.shape[-1]} keys, which are not the '
        f'{len(text.pieces)} tokens alone; a map of tokens would name them wrongly'
      )
    weights.append(found)
  return AttentionMaps(pieces=text.pieces, weights=tuple(weights))


def read_weights(call: Call) -> jax.Array | None:
  """Returns the softmax weights [B, H, T, S] of a call that mixes tokens, None of any other."""
  if call.method == 'weigh':
    return call.result
  module = call.module
  if isinstance(module, HeadAttention) and call.method in ('attend', 'attend_own'):
    signature = _ATTEND if call.method == 'attend' else _ATTEND_OWN
    given = signature.bind(module, *call.arguments, **call.options).arguments
    return head_weights(given['query'], given['key'], seen_mask(given))
  if isinstance(module, ChosenAttention) and call.method == 'mix_chosen':
    given = _MIX_CHOSEN.bind(module, *call.arguments, **call.options).arguments
    query = given['query'].make(module.config)
    mask = chosen_mask(given['chosen'], query[0].shape[1], given['key'][0].shape[1])
    bias = given.get('bias')
    bias = None if bias is None else jnp.broadcast_to(bias[:, None, :], mask.shape)
    return latent_weights(module, query, given['key'], mask, bias)
  if not isinstance(module, LatentAttention):
    return None
  if call.method in ('mix_seen', 'mix_own'):
    signature = _MIX_SEEN if call.method == 'mix_seen' else _MIX_OWN
    given = signature.bind(module, *call.arguments, **call.options).arguments
    return latent_weights(module, given['query'], given['key'], seen_mask(given), None)
  if call.method == 'mix':
    given = _MIX.bind(module, *call.arguments, **call.options).arguments
    bias = given.get('bias')
    return latent_weights(module, given['query'], given['key'], given['mask'], bias)
  return None


def seen_mask(given: Mapping[str, Any]) -> jax.Array:
  """Returns who sees whom, [B, T, S] bool, by the arguments of a call: `seen`, or the context's."""
  seen, window = given.get('seen'), given.get('window')
  if seen is None:
    seen = given['context'].own()
  mask = visible(*seen)
  if window is not None:
    mask &= window_mask(seen.query_positions, seen.key_positions, *window)
  return mask


def head_weights(query: jax.Array, key: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns the softmax weights [B, H, T, S] float32 of multi-head attention.

  Args:
    query: [B, T, H, K].
    key: [B, S, G, K]; G divides H.
    mask: [B, T, S] bool.
  """
  key = jnp.repeat(key.astype(jnp.float32), query.shape[2] // key.shape[2], axis=2)
  scores = jnp.einsum('bthk,bshk->bhts', query.astype(jnp.float32), key)
  scores *= query.shape[-1] ** -0.5
  return jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)


def chosen_mask(chosen: Chosen, queries: int, keys: int) -> jax.Array:
  """Returns who sees whom, [B, T, S] bool, where every block of queries has chosen its keys."""
  lists = [jnp.repeat(membership(x, keys), chosen.block, axis=1) for x in chosen.indices]
  mask = jnp.concatenate(lists, axis=1)[:, :queries]
  return mask if chosen.seen is None else mask & visible(*chosen.seen)


def latent_weights(
  module: LatentAttention, query: Any, key: Any, mask: jax.Array, bias: jax.Array | None
) -> jax.Array:
  """Returns the softmax weights [B, H, T, S] float32 of latent attention.

  Args:
    module: whose weights bring the latent to keys.
    query: without position [B, T, H, nope] and rotated [B, T, H, R].
    key: latent [B, S, C] and rotated shared key [B, S, R].
    mask: [B, T, S] bool.
    bias: [B, T, S] float32 added to the scores, or None.

  Source: DeepSeek-V2, arXiv 2405.04434, section 2.1, equations 37 to 47.
  """
  c = module.config
  (query_nope, query_rope), (latent, rope_key) = query, key
  up: jax.Array = module.get_variable('params', 'key_value_up')[..., : c.nope_dim]
  keys = jnp.einsum('bsc,chk->bshk', latent.astype(jnp.float32), up)
  scores = jnp.einsum('bthk,bshk->bhts', query_nope.astype(jnp.float32), keys)
  scores += jnp.einsum(
    'bthr,bsr->bhts', query_rope.astype(jnp.float32), rope_key.astype(jnp.float32)
  )
  scores *= c.softmax_scale
  if bias is not None:
    scores += bias[:, None]
  return jax.nn.softmax(jnp.where(mask[:, None], scores, MASKED), axis=-1)
