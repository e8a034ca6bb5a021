"""Segments with a recurrent memory against a float64 oracle and a slow twin; cache; modalities."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.recurrent import Recurrent, RecurrentAttention, Slots
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.context import IMAGE, TEXT, packed_context, text_context
from deepseek_jax.layers.weights import vector, weight
from deepseek_jax.ops.attention.recurrent import attend_by_definition, memory_by_definition
from deepseek_jax.ops.attention.reference import visible

SIZES = {'heads': 2, 'nope_dim': 6, 'rope_dim': 4, 'value_dim': 5, 'latent': 8}
CONFIG = Recurrent(**SIZES, size=8, memory=Slots(text=3, image=2), rope=RoPE(theta=50.0))
WIDTH = 7


@functools.cache
def params():
  """Weights away from their start."""
  x = np.zeros((1, 2, WIDTH), np.float32)
  shapes = jax.eval_shape(CONFIG.build().init, jax.random.key(0), x, packed_context([(2,)], 2))
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.6, leaf.shape), jnp.float32),
    nn.meta.unbox(shapes['params']),
  )


def activations(rows, length, seed=0):
  return np.random.default_rng(seed).standard_normal((rows, length, WIDTH)).astype(np.float32)


def pictured(context, seed=0):
  """Every third token or so is of a picture."""
  modality = np.random.default_rng(seed).random(context.tokens.shape) < 0.3
  return dataclasses.replace(context, modality=np.where(modality, IMAGE, TEXT).astype(np.int32))


@functools.partial(jax.jit, static_argnums=(3,))
def run(params, x, context, config=CONFIG):
  return config.build().apply({'params': params}, x, context)[0]


@functools.partial(jax.jit, static_argnums=(4,))
def step(params, x, context, cache, config=CONFIG):
  return config.build().apply({'params': params}, x, context, cache)


def part_of(context, rows):
  """The tokens `rows` of every row."""
  return jax.tree.map(lambda a: a[:, rows], context)


def read(x, context, chunks, config=CONFIG):
  """Feeds a row in pieces; returns the outputs and the cache."""
  cache = config.empty_cache(len(x), 1, jnp.float32)
  start, parts = 0, []
  for size in chunks:
    rows = slice(start, start + size)
    y, cache = step(params(), x[:, rows], part_of(context, rows), cache, config)
    parts.append(np.asarray(y))
    start += size
  assert start == x.shape[1]
  return np.concatenate(parts, axis=1), cache


def norm_rows(x, scale):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def turn(x, position, config):
  """Rotates pairs of neighbouring channels of x [R]."""
  numbers = (x[0::2] + 1j * x[1::2]) * np.exp(1j * position * config.rope.frequencies(len(x)))
  return np.stack([numbers.real, numbers.imag], axis=-1).reshape(x.shape)


def document(p, c, x, modality):
  """One document [T, D] -> [T, D], by the definition."""
  both, slopes = x @ p['latent_down'], np.log1p(np.exp(p['fading']))
  latent = norm_rows(both[:, : c.latent], p['latent_norm']['scale'])
  kinds = [TEXT] * c.memory.text + [IMAGE] * c.memory.image
  out = np.zeros(x.shape)
  for t in range(len(x)):
    begin = t // c.size * c.size
    keys = [(latent[s], turn(both[s, c.latent :], s, c)) for s in range(begin, t + 1)]
    for j, kind in enumerate(kinds):
      past = [s for s in range(begin) if modality[s] == kind]
      if past:
        logits = np.array(
          [latent[s] @ p['slot_query'][:, j] + slopes[j] * s / c.size for s in past]
        )
        weights = np.exp(logits - logits.max())
        keys.append((weights / weights.sum() @ latent[past], np.zeros(c.rope_dim)))
    for h in range(c.heads):
      q = x[t] @ p['query'][:, h]
      rotated = turn(q[c.nope_dim :], t, c)
      up_key, up_value = (
        p['key_value_up'][:, h, : c.nope_dim],
        p['key_value_up'][:, h, c.nope_dim :],
      )
      scores = np.array([q[: c.nope_dim] @ (k @ up_key) + rotated @ r for k, r in keys])
      weights = np.exp((scores - scores.max()) * c.softmax_scale)
      mixed = weights / weights.sum() @ np.array([k for k, _ in keys])
      out[t] += mixed @ up_value @ p['output'][h]
  return out


@pytest.mark.parametrize('size', [1, 8, 16])
@pytest.mark.parametrize(
  'lengths', [((45,),), ((9, 21, 1, 2), (1, 30, 8, 6), (16, 16, 13))], ids=['one', 'packed']
)
def test_against_its_oracle(lengths, size):
  config = dataclasses.replace(CONFIG, size=size)
  context = pictured(packed_context(lengths, 47))
  x = activations(len(lengths), 47)
  got = np.asarray(run(params(), x, context, config))
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params())
  for row, documents in enumerate(lengths):
    start = 0
    for count in documents:
      of = slice(start, start + count)
      want = document(p, config, x[row, of].astype(np.float64), context.modality[row, of])
      np.testing.assert_allclose(got[row, of], want, rtol=2e-4, atol=2e-5)
      start += count
  assert np.isfinite(got).all()


class SlowAttention(RecurrentAttention):
  """The layer, with a memory for every query made from all pairs of tokens."""

  @nn.compact
  def __call__(self, x, context, cache=None):
    c, places, segments = self.config, context.positions, context.segments
    (query, rotated), key = self.queries(x, context), self.latents(x, context)
    in_latent, up_value = self.absorb(query)
    slots = c.memory.total
    u = weight(self, 'slot_query', (c.latent, slots), ('latent', None), dtype=jnp.float32)
    memory = memory_by_definition(
      key[0],
      key[0] @ u,
      jnp.broadcast_to(c.memory.takes(context.modality), (*x.shape[:2], slots)),
      jax.nn.softplus(vector(self, 'fading', np.zeros(slots))),
      places,
      segments,
      c.size,
    )
    mask = visible(places, places, segments, segments)
    mask &= (places // c.size)[:, :, None] == (places // c.size)[:, None]
    mixed = attend_by_definition((in_latent, rotated), key, memory, mask, c.softmax_scale)
    return self.project(jnp.einsum('bthc,chv->bthv', mixed, up_value), x.shape[-1]), None


@functools.partial(jax.jit, static_argnums=(3,))
def slow(params, x, context, config):
  return SlowAttention(config).apply({'params': params}, x, context)[0]


@pytest.mark.parametrize(('length', 'size'), [(7, 3), (37, 8), (45, 16), (129, 8)])
def test_gradient_is_that_of_the_slow_twin(length, size):
  config = dataclasses.replace(CONFIG, size=size)
  lengths = [(length,), (length // 2, 1, length // 3)]
  context, x = pictured(packed_context(lengths, length)), activations(2, length)
  real = (context.segments > 0)[..., None]

  def both(function):
    loss = lambda p, x: jnp.sum(jnp.sin(3 * function(p, x, context, config)) * real)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(params(), x)

  found, expected = both(run), both(slow)
  assert found[0] == pytest.approx(float(expected[0]), rel=1e-4)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(expected[1]), strict=True
  ):
    assert np.abs(b).max() > 1e-3, path
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max(), err_msg=str(path))


@pytest.mark.parametrize('lengths', [((8,),), ((8, 3, 1), (5, 7))], ids=['one', 'packed'])
def test_one_segment_is_mla(lengths):
  context = packed_context(lengths)
  x = activations(len(lengths), context.tokens.shape[1])
  weights = {k: v for k, v in params().items() if k not in ('slot_query', 'fading')}
  dense = MLA(**SIZES, rope=CONFIG.rope)
  real = np.asarray(context.segments) > 0
  want = np.asarray(run(weights, x, context, dense))[real]
  np.testing.assert_allclose(run(params(), x, context)[real], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('size', [8, 16])
@pytest.mark.parametrize(
  'chunks',
  [(1,) * 7, (1,) * 45, (5, 1, 19, 19, 1), (1,) * 129, (7, 61, 61)],
  ids=['7 ones', '45 ones', '45 some', '129 ones', '129 some'],
)
def test_cache(chunks, size):
  """Tokens that come bit by bit give what they give together; rows may end in padding."""
  config = dataclasses.replace(CONFIG, size=size)
  lengths = [(sum(chunks),), (sum(chunks[1:]),)]
  x, context = activations(2, sum(chunks), seed=3), pictured(packed_context(lengths))
  # Generation counts the positions of padding on.
  positions = np.broadcast_to(np.arange(sum(chunks), dtype=np.int32), context.tokens.shape)
  context = dataclasses.replace(context, positions=positions)
  want = np.asarray(run(params(), x, context, config))
  got, cache = read(x, context, chunks, config)
  for row, (count,) in enumerate(lengths):
    np.testing.assert_allclose(got[row, :count], want[row, :count], rtol=1e-3, atol=1e-4)
  # Padding has left no trace in the row that ended.
  short = slice(sum(chunks[1:]))
  _, alone = read(x[:, short], part_of(context, short), chunks[1:], config)
  held = np.asarray(cache.seen.positions[1])
  np.testing.assert_array_equal(held, alone.seen.positions[1])
  pairs = [(c.seen.latent[1][held >= 0], c.mixed[1], c.total[1], c.top[1]) for c in (cache, alone)]
  for a, b in zip(*pairs, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_cache_does_not_know_how_long_the_text_will_be():
  count = lambda length: sum(  # noqa: E731
    leaf.nbytes for leaf in jax.tree.leaves(CONFIG.empty_cache(1, length, jnp.bfloat16))
  )
  assert count(4) == count(100_000)


@pytest.mark.parametrize('size', [8, 16])
def test_packed_documents_are_as_if_alone(size):
  config = dataclasses.replace(CONFIG, size=size)
  documents = [1, 8, 1, 33, 1, 1, 16, 7, 24]
  context, x = pictured(packed_context([documents], 101)), activations(1, 101)
  got = np.asarray(run(params(), x, context, config))
  start = 0
  for count in documents:
    of = slice(start, start + count)
    # Padded to one length, so that one program serves all.
    alone = np.pad(x[:, of], ((0, 0), (0, 33 - count), (0, 0)))
    modality = np.pad(context.modality[:, of], ((0, 0), (0, 33 - count)))
    own = dataclasses.replace(packed_context([(count,)], 33), modality=modality)
    want = np.asarray(run(params(), alone, own, config))[:, :count]
    np.testing.assert_allclose(got[:, of], want, rtol=1e-4, atol=1e-5)
    start += count


def test_batches_go_on_with_their_documents():
  """Rows of 32 tokens, each going on where the one before stopped, are one long row."""
  documents = [50, 3, 1, 40, 2, 8, 24]
  context, x = pictured(packed_context([documents], 128)), activations(1, 128)
  want = np.asarray(run(params(), x, context))
  got, _ = read(x, context, (32,) * 4)
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
  # Without what is carried the second row would be another.
  lost = run(params(), x[:, 32:64], part_of(context, slice(32, 64)))
  assert np.abs(lost[:, :18] - want[:, 32:50]).max() > 0.05


def test_what_a_cache_carries_is_a_value():
  """The gradient of a call ends at its cache, which is an argument like any other."""
  context, x = packed_context([(24,)], 24), activations(1, 24)
  _, cache = read(x[:, :16], part_of(context, slice(16)), (16,))

  def loss(x, cache):
    return jnp.sum(jnp.sin(step(params(), x, part_of(context, slice(16, 24)), cache)[0]))

  to_x, to_cache = jax.jit(jax.grad(loss, (0, 1), allow_int=True))(x[:, 16:], cache)
  assert np.abs(to_x).max() > 1e-3
  assert np.abs(to_cache.mixed).max() > 1e-5


def influence(fading, segments=6):
  """How much the tokens of each segment move when one of the first does."""
  weights = params() | {
    'fading': jnp.full(CONFIG.memory.total, fading),
    'slot_query': 0 * params()['slot_query'],
  }
  length = segments * CONFIG.size
  x, context = activations(1, length), text_context(np.ones((1, length), np.int32))
  moved = x.copy()
  moved[0, 3] *= -1
  change = np.asarray(run(weights, moved, context)) - np.asarray(run(weights, x, context))
  return np.linalg.norm(change.reshape(segments, -1), axis=-1)


def test_memory_carries():
  found = {rate: influence(np.log(np.expm1(rate))) for rate in (1e-4, 1.5)}
  for moves in found.values():
    assert (moves[1:] > 1e-5).all()
  kept, faded = (moves[-1] / moves[1] for moves in found.values())
  # Four more segments: a fifth of the mean; where slots fade, e^-6 of what it would be.
  assert 0.1 < kept < 0.4
  assert faded < 0.02
  assert (np.diff(found[1.5][1:]) < 0).all()


def test_slots_pool_their_own_modality():
  context = pictured(packed_context([(40,)], 40))
  x = activations(1, 40)
  text = np.flatnonzero(context.modality[0, :32] == TEXT)[2]
  image = np.flatnonzero(context.modality[0, :32] == IMAGE)[2]

  def slots(x):
    held = read(x, context, (40,))[1].seen
    assert (np.asarray(held.positions[0, CONFIG.size :]) == 32).all()
    return np.asarray(held.latent[0, CONFIG.size :])

  before = slots(x)
  for token, moved, still in ((text, slice(0, 3), slice(3, 5)), (image, slice(3, 5), slice(0, 3))):
    changed = x.copy()
    changed[0, token] += 2.0
    after = slots(changed)
    np.testing.assert_array_equal(after[still], before[still])
    assert (np.abs(after[moved] - before[moved]).max(axis=-1) > 1e-4).all()


def test_slots_of_a_modality_that_is_not_there():
  untold, x = packed_context([(40,)], 40), activations(1, 40)
  told = dataclasses.replace(untold, modality=np.full((1, 40), TEXT, np.int32))
  got, cache = read(x, told, (40,))
  np.testing.assert_array_equal(cache.seen.positions[0, CONFIG.size :], [32, 32, 32, -1, -1])
  fewer = dataclasses.replace(CONFIG, memory=Slots(text=3))
  weights = params() | {
    'slot_query': params()['slot_query'][:, :3],
    'fading': params()['fading'][:3],
  }
  want = run(weights, x, untold, fewer)

  def loss(p):
    y = CONFIG.build().apply({'params': p}, x, untold)[0]
    return jnp.sum(jnp.sin(y)), y

  grads, untold_got = jax.jit(jax.grad(loss, has_aux=True))(params())
  for found in (got, untold_got):
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  assert not np.any(grads['slot_query'][:, 3:])
  assert np.any(grads['slot_query'][:, :3])


def test_slots_forget_at_different_rates_at_first():
  config = dataclasses.replace(CONFIG, memory=Slots(text=5, image=1))
  init = jax.jit(config.build().init)
  start = init(jax.random.key(0), activations(1, 2), packed_context([(2,)], 2))
  rates = np.asarray(jax.nn.softplus(nn.meta.unbox(start)['params']['fading']))
  np.testing.assert_allclose(rates, [1 / 64, 1 / 16, 1 / 4, 1, 4, 1 / 64], rtol=1e-5)


@pytest.mark.parametrize('length', [5, 8, 9, 37])
def test_counts(length):
  config = dataclasses.replace(CONFIG, memory=Slots(text=3))
  pairs = sum(t % 8 + 1 + (3 if t >= 8 else 0) for t in range(length))
  assert config.visible_tokens(length) == pytest.approx(pairs / length)
  boundaries = len([t for t in range(1, length) if t % 8 == 0])
  flops = pairs * 2 * 2 * (6 + 4 + 5)
  flops += length * 2 * 3 * 8 + boundaries * 3 * 2 * 8 * 2 * (6 + 5)
  assert config.mixing_flops(length) == pytest.approx(flops / length)


@pytest.mark.parametrize(
  ('make', 'names'),
  [
    (lambda: Recurrent(heads=1, size=0), ['size']),
    (lambda: Recurrent(heads=0, size=0), ['heads']),
    (lambda: Slots(text=-1), ['text']),
    (lambda: Slots(text=-1, image=-2), ['text', 'image']),
    (lambda: Slots(text=0), ['text']),
  ],
)
def test_wrong_fields(make, names):
  with pytest.raises(ConfigError) as caught:
    make()
  assert [m.split('`')[1] for m in caught.value.messages] == names
