"""Drafting with the model's own look-ahead: pure functions of weights and of what rows have seen.

The modules of multi-token prediction run beside the model, with caches of their own. Module k at
position t reads the state of depth k - 1 there and the token k places on, and drafts the one after
it. Of a row with n known tokens the model has read the first n - 1; module 1 is fed the positions
up to n - 2, whose output is a draft of token n; module 2 the same positions, the last of them with
that draft, and so on: K modules draft K tokens. The model then reads the last known token and the
drafts at once, and what it says of each is compared.

What a module was fed with drafts that did not stand is fed again, up to K positions back, and so
is what the model has read beyond the known tokens: caches have room to take K tokens back.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike

from deepseek_jax.core.config import ConfigError
from deepseek_jax.infer.decode import Variables, fresh_caches, row_keys, whole
from deepseek_jax.infer.sample import Sampler
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.dispatch.capacity import Capacity
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.balanced import Balanced
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.plan import Block
from deepseek_jax.models.stack import empty_cache
from deepseek_jax.ops import sampling

DRAFT, ACCEPT, REST = range(3)
"""What a random number is for: each draw of a token has a key of its own."""


@struct.dataclass
class Reading:
  """What is known of B prompts after some of their tokens.

  Attributes:
    caches: of the model.
    drafters: of the modules, first to last.
    states: [B, K, …] what the first module reads of the last K tokens of each row.
    logits: [B, V] float32 after the last token of each row.
  """

  caches: Any
  drafters: tuple[Any, ...]
  states: jax.Array
  logits: jax.Array


@struct.dataclass
class Progress:
  """Where B rows stand between two steps.

  Attributes:
    caches: of the model, which has read all known tokens but the last.
    drafters: of the modules, first to last.
    tokens: [B, S] int32, each in the place of its position; beyond the known ones meaningless.
    known: [B] int32 how many are known.
    first: [B] int32 the first of the positions that the modules are to be fed.
    states: [B, 2K, …] what the first module reads at them, as far as the model has read.
    starts: [B] int32 tokens of the prompt.
    ends: [B] int32 tokens at which a row is complete.
  """

  caches: Any
  drafters: tuple[Any, ...]
  tokens: jax.Array
  known: jax.Array
  first: jax.Array
  states: jax.Array
  starts: jax.Array
  ends: jax.Array


def drafts_of(decoder: Decoder) -> int:
  """How many tokens K the model drafts at once.

  Raises:
    ConfigError: it has nothing to draft with, or cannot take back what it has read.
  """
  c = decoder.config
  if c.mtp is None:
    raise ConfigError(
      'speculative decoding drafts with multi-token prediction: found `mtp` None, expected a model '
      'that was trained with modules such as MTP(depth=1)'
    )
  layers = c.layers()
  named = [(f'layer {number}', block) for number, block in enumerate(layers)]
  named += [(f'mtp {number}', c.mtp.block(layers[-1])) for number in range(c.mtp.depth)]
  faults: dict[str, list[str]] = {}
  for name, block in named:
    try:
      jax.eval_shape(functools.partial(empty_cache, block, 1, 1, decoder.dtype, c.mtp.depth))
    except ConfigError as error:
      for message in error.messages:
        faults.setdefault(message, []).append(name)
    for message in looks_at_the_batch(block):
      faults.setdefault(message, []).append(name)
  if faults:
    raise ConfigError([f'{", ".join(names)}: {message}' for message, names in faults.items()])
  return c.mtp.depth


def looks_at_the_batch(block: Block) -> list[str]:
  """Says what of a layer gives a token other results when drafts are fed beside it."""
  moe = block.feed_forward
  if not isinstance(moe, MoE):
    return []
  found = []
  if isinstance(moe.router, Balanced):
    found.append('router Balanced deals experts by the place of a token in its batch')
  if isinstance(moe.dispatch, Capacity):
    found.append('dispatch Capacity drops choices by the tokens beside them')
  if isinstance(moe.dispatch, AllToAll) and moe.dispatch.bound is not None:
    found.append(f'dispatch AllToAll(bound={moe.dispatch.bound}) drops choices of full shards')
  reason = 'drafts that do not stand would change the tokens; expected a layer where each is alone'
  return [f'{message}: {reason}' for message in found]


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def start_reading(decoder: Decoder, variables: Variables, batch: int, slots: int) -> Reading:
  """Returns what is known of `batch` prompts before their first tokens.

  Args:
    decoder: the model.
    variables: `params` and `buffers`.
    batch: rows B.
    slots: most tokens that a row is fed, drafts among them.
  """
  c = decoder.config
  assert c.mtp is not None
  depth, block = c.mtp.depth, c.mtp.block(c.layers()[-1])
  caches = fresh_caches(decoder, batch, slots, depth)
  nothing = jnp.zeros((batch, depth), jnp.int32)
  context = Context(tokens=nothing, positions=nothing, segments=nothing)
  states = jax.eval_shape(lambda: _run(decoder, variables, context, caches))[0]
  return whole(
    Reading(
      caches=caches,
      drafters=tuple(empty_cache(block, batch, slots, decoder.dtype, depth) for _ in range(depth)),
      states=jnp.zeros(states.shape, states.dtype),
      logits=jnp.zeros((batch, c.vocab), jnp.float32),
    )
  )


def read_chunk(
  decoder: Decoder,
  variables: Variables,
  reading: Reading,
  tokens: jax.Array,
  begin: jax.Array,
  counts: jax.Array,
  lengths: jax.Array,
) -> Reading:
  """Feeds the next tokens of every prompt to the model, and to the modules as far as they can.

  Args:
    decoder: the model.
    variables: `params` and `buffers`.
    reading: so far.
    tokens: [B, T + K] int32; row b holds `counts[b]` tokens to feed. The K after the first T are
      only looked at.
    begin: [B] int32 position of each row's first token here.
    counts: [B] int32, 0 to T.
    lengths: [B] int32 tokens of the whole prompts.

  Returns:
    What is known then; rows without a token here keep their logits and states.
  """
  depth = len(reading.drafters)
  length = tokens.shape[1] - depth
  offsets = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (tokens.shape[0], length))
  positions = begin[:, None] + offsets
  context = Context(
    tokens=tokens[:, :length],
    positions=positions,
    segments=(offsets < counts[:, None]).astype(jnp.int32),
  )
  # Every module reads the positions whose tokens are known to the last of them; the first step
  # feeds them the rest.
  near = (positions < lengths[:, None] - depth).astype(jnp.int32)
  ahead = dataclasses.replace(context, segments=context.segments * near)

  def forward(module: Decoder) -> Reading:
    states, hidden, caches = _read(module, context, reading.caches)
    logits = module.logits(_at(hidden, counts - 1), context)[:, 0]
    state, drafters = states, []
    for k, cache in enumerate(reading.drafters, start=1):
      state, _, cache = module.ahead(k, state, tokens[:, k : k + length], ahead, cache)
      drafters.append(cache)
    both = jnp.concatenate([reading.states, states], axis=1)
    return Reading(
      caches=caches,
      drafters=tuple(drafters),
      states=_window(both, counts[:, None] + jnp.arange(depth)),
      logits=jnp.where(counts[:, None] > 0, logits, reading.logits),
    )

  return whole(decoder.apply(variables, method=forward))


def begin(
  reading: Reading, chosen: jax.Array, tokens: ArrayLike, lengths: ArrayLike, count: ArrayLike
) -> Progress:
  """Returns where rows stand whose prompts have been read; the caches become part of it.

  Args:
    reading: of the prompts.
    chosen: [B] int32 first new token of each row.
    tokens: [B, S] int32 prompts, padded to as many places as there may be tokens.
    lengths: [B] int32 tokens of the prompts.
    count: [] int32 most new tokens of a row.
  """
  facts = _begin(reading.states, chosen, tokens, lengths, count)
  return Progress(caches=reading.caches, drafters=reading.drafters, **facts)


@jax.jit
def _begin(
  states: jax.Array, chosen: jax.Array, tokens: jax.Array, lengths: jax.Array, count: jax.Array
) -> dict[str, jax.Array]:
  depth = states.shape[1]
  rows, first = jnp.arange(tokens.shape[0]), jnp.maximum(lengths - depth, 0)
  # The last state kept is that of position lengths - 1.
  places = first[:, None] - (lengths[:, None] - depth) + jnp.arange(2 * depth)
  facts = {
    'tokens': tokens.at[rows, lengths].set(chosen),
    'known': lengths + 1,
    'first': first,
    'states': _window(states, places),
    'starts': lengths,
    'ends': lengths + count,
  }
  return whole(facts)


def step(
  decoder: Decoder, variables: Variables, progress: Progress, sampler: Sampler, seed: jax.Array
) -> tuple[Progress, jax.Array, jax.Array]:
  """Drafts, verifies, and goes on to the tokens that stand and the one after them.

  Args:
    decoder: the model.
    variables: `params` and `buffers`.
    progress: where rows stand.
    sampler: how tokens are chosen, drafted ones too.
    seed: of the draws.

  Returns:
    Where rows stand then; new tokens [B, K + 1] int32; and how many drafts [B] int32 stand. Of the
    new tokens of a row one more than that are known, though no more than complete it.
  """
  depth, p = len(progress.drafters), progress
  p, proposal = draft(decoder, variables, p, sampler, seed)
  offsets = jnp.arange(depth + 1, dtype=jnp.int32)
  positions = p.known[:, None] - 1 + offsets
  fed = _window(p.tokens, positions)
  context = Context(tokens=fed, positions=positions, segments=jnp.ones_like(fed))
  states, hidden, caches = _run(decoder, variables, context, p.caches)
  logits: Any = decoder.apply(variables, hidden, context, method='logits')
  target = sampler.probabilities(logits.reshape(-1, logits.shape[-1])).reshape(logits.shape)
  uniforms = jnp.stack(
    [jax.vmap(jax.random.uniform)(_keys(p, seed, k, ACCEPT)) for k in range(depth)], axis=1
  )
  accepted, rest = sampling.accept_drafts(target, proposal, fed[:, 1:], uniforms)
  chosen = sampling.sample(jnp.log(rest), _keys(p, seed, accepted, REST))
  rows = jnp.arange(fed.shape[0])
  tokens = p.tokens.at[rows, p.known + accepted].set(chosen, mode='drop')
  after = Progress(
    caches=caches,
    drafters=p.drafters,
    tokens=tokens,
    known=jnp.minimum(p.known + accepted + 1, p.ends),
    first=jnp.maximum(p.known - depth, 0),
    states=_states_after(p, states),
    starts=p.starts,
    ends=p.ends,
  )
  return whole((after, _window(tokens, p.known[:, None] + offsets), accepted))


def draft(
  decoder: Decoder, variables: Variables, progress: Progress, sampler: Sampler, seed: jax.Array
) -> tuple[Progress, jax.Array]:
  """Feeds the modules; puts a draft of each after the known tokens.

  Args:
    decoder: the model.
    variables: `params` and `buffers`.
    progress: where rows stand.
    sampler: how drafts are chosen.
    seed: of the draws.

  Returns:
    Where rows stand, and float32 [B, K, V] the distributions that drafts were drawn from.
  """
  p, depth = progress, len(progress.drafters)
  offsets = jnp.arange(2 * depth, dtype=jnp.int32)
  positions = p.first[:, None] + offsets
  counts = p.known - 1 - p.first
  rows = jnp.arange(p.known.shape[0])
  context = Context(
    tokens=_window(p.tokens, positions),
    positions=positions,
    segments=(offsets < counts[:, None]).astype(jnp.int32),
  )

  def forward(module: Decoder) -> tuple[Progress, jax.Array]:
    state, tokens, drafters, proposals = p.states, p.tokens, [], []
    for k, cache in enumerate(p.drafters, start=1):
      seen = _window(tokens, positions + k)
      state, hidden, cache = module.ahead(k, state, seen, context, cache)
      logits = module.logits(_at(hidden, counts - 1), context)[:, 0]
      proposal = sampler.probabilities(logits)
      drawn = sampling.sample(jnp.log(proposal), _keys(p, seed, k - 1, DRAFT))
      tokens = tokens.at[rows, p.known + (k - 1)].set(drawn, mode='drop')
      drafters.append(cache)
      proposals.append(proposal)
    after = dataclasses.replace(p, tokens=tokens, drafters=tuple(drafters))
    return after, jnp.stack(proposals, axis=1)

  found: Any = decoder.apply(variables, method=forward)
  return found


def _states_after(progress: Progress, read: jax.Array) -> jax.Array:
  """Returns the states [B, 2K, …] at the positions that are fed to the modules next.

  Args:
    progress: before the step: its states are those of positions before the last known token.
    read: [B, K + 1, …] states of that token and of the drafts.
  """
  p, kept = progress, progress.states.shape[1]
  depth = kept // 2
  positions = jnp.maximum(p.known[:, None] - depth, 0) + jnp.arange(kept)
  new = jnp.minimum(positions - (p.known[:, None] - 1), depth)
  places = jnp.where(new < 0, positions - p.first[:, None], kept + new)
  return _window(jnp.concatenate([p.states, read], axis=1), places)


def _run(
  decoder: Decoder, variables: Variables, context: Context, caches: Any
) -> tuple[jax.Array, jax.Array, Any]:
  found: Any = decoder.apply(variables, context, caches, method=_read)
  return found


def _read(module: Decoder, context: Context, caches: Any) -> tuple[jax.Array, jax.Array, Any]:
  """Returns what the first module reads, the hidden states [B, T, D], and the caches."""
  stream, caches = module.run(context, caches)
  hidden = module.finish(stream)
  assert module.config.mtp is not None
  return module.config.mtp.start(stream, hidden), hidden, caches


def _keys(progress: Progress, seed: jax.Array, ahead: Any, purpose: int) -> jax.Array:
  """Returns a key a row for the token that is `ahead` places after the known ones."""
  keys = row_keys(seed, progress.known + ahead - progress.starts)
  return jax.vmap(lambda key: jax.random.fold_in(key, purpose))(keys)


def _window(x: jax.Array, places: jax.Array) -> jax.Array:
  """Takes the `places` [B, n] of `x` [B, S, …]; beyond the end the last."""
  return jax.vmap(lambda row, i: jnp.take(row, i, axis=0, mode='clip'))(x, places)


def _at(hidden: jax.Array, places: jax.Array) -> jax.Array:
  """Takes one place [B] of each row of `hidden` [B, T, D]; of a row without any: the first."""
  return _window(hidden, jnp.maximum(places, 0)[:, None])


# Compiled once for each decoder, sampler and set of shapes; memory of what is passed in is used
# again.
jit_read_chunk = jax.jit(read_chunk, static_argnums=0, donate_argnums=2)
jit_step = jax.jit(step, static_argnums=(0, 3), donate_argnums=2)
