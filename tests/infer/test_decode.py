"""What a cache remembers is enough: decoding gives the logits of the whole forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.infer import decode
from deepseek_jax.infer.decode import (
  choose,
  fresh_caches,
  jit_decode_step,
  jit_full_logits,
  jit_prefill,
)
from deepseek_jax.infer.sample import Sample
from deepseek_jax.layers.context import text_context
from deepseek_jax.models.remat import EveryLayer, SquareRoot

KINDS = (
  'mla',
  'mla_query_latent',
  'mla_yarn',
  'window',
  'gated',
  'mha',
  'top_k',
  'dsa',
  'dsa_shared',
  'recurrent',
)
VOCAB, LENGTH = 61, 19
TOLERANCE = 1e-5


def tokens_of(batch, length=LENGTH):
  return np.random.default_rng(3).integers(0, VOCAB, (batch, length), np.int32)


def full(decoder, variables, tokens):
  counts = np.full(len(tokens), tokens.shape[1], np.int32)
  return np.asarray(jit_full_logits(decoder, variables, tokens, counts))


def assert_close(found, expected):
  assert np.abs(np.asarray(found) - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize('lengths', [(1, 11, 4), (1,)], ids=['three', 'one'])
@pytest.mark.parametrize('kind', KINDS)
def test_decode_is_the_full_forward_at_every_position(make_model, kind, lengths):
  """Prompts of unequal lengths in one padded block, then one token at a time to the end."""
  decoder, variables = make_model(kind)
  batch, lengths = len(lengths), np.array(lengths, np.int32)
  tokens = tokens_of(batch)
  expected = full(decoder, variables, tokens)
  assert np.abs(np.diff(expected, axis=1)).max() > 0.1
  block = np.where(np.arange(12) < lengths[:, None], tokens[:, :12], 7)
  caches = fresh_caches(decoder, batch, LENGTH)
  zeros = np.zeros_like(lengths)
  logits, caches = jit_prefill(decoder, variables, caches, block, zeros, lengths)
  rows = np.arange(batch)
  assert_close(logits, expected[rows, lengths - 1])
  checked = {(row, int(length) - 1) for row, length in zip(rows, lengths)}
  positions = lengths
  while positions.min() < LENGTH:
    # A row at its end is fed its last token again: the rows beside it must not care.
    at = np.minimum(positions, LENGTH - 1)
    logits, caches = jit_decode_step(decoder, variables, caches, tokens[rows, at], at)
    going = positions < LENGTH
    assert_close(np.asarray(logits)[going], expected[rows, at][going])
    checked |= {(row, int(p)) for row, p in zip(rows[going], at[going])}
    positions = positions + 1
  assert len(checked) == sum(LENGTH - length + 1 for length in lengths.tolist())


@pytest.mark.parametrize('chunk', [1, 3, 7])
@pytest.mark.parametrize(
  'kind', ['mla', 'window', 'gated', 'top_k', 'dsa', 'dsa_shared', 'recurrent']
)
def test_prefill_in_chunks(make_model, kind, chunk):
  """Also where a ring goes round several times, and where rows end in different chunks."""
  decoder, variables = make_model(kind)
  tokens, lengths = tokens_of(3), np.array([2, LENGTH, 9], np.int32)
  expected = full(decoder, variables, tokens)
  caches, checked = fresh_caches(decoder, 3, LENGTH + 1), 0
  for start in range(0, LENGTH, chunk):
    counts = np.clip(lengths - start, 0, chunk)
    block = np.pad(tokens[:, start : start + chunk], ((0, 0), (0, chunk)))[:, :chunk]
    begin = np.full(3, start, np.int32)
    logits, caches = jit_prefill(decoder, variables, caches, block, begin, counts)
    for row in np.flatnonzero(counts):
      assert_close(logits[row], expected[row, start + counts[row] - 1])
      checked += 1
  assert checked == sum(-(-int(length) // chunk) for length in lengths)
  # Rows that ended early and waited go on from where they were.
  following = np.array([tokens[0, 2], 0, tokens[2, 9]], np.int32)
  logits, _ = jit_decode_step(decoder, variables, caches, following, lengths)
  assert_close(logits[0], expected[0, 2])
  assert_close(logits[2], expected[2, 9])


@pytest.mark.parametrize('kind', KINDS)
def test_a_token_with_padding_beside_it(make_model, kind, monkeypatch):
  """What a lone bfloat16 row is fed as on a CPU: the padding leaves no trace."""
  decoder, variables = make_model(kind)
  monkeypatch.setattr(decode, 'alone_is_slow', lambda *_: True)
  tokens = tokens_of(1)
  expected = full(decoder, variables, tokens)
  step = jax.jit(lambda *arguments: decode.decode_step(decoder, variables, *arguments))
  caches = fresh_caches(decoder, 1, LENGTH)
  for place in range(LENGTH):
    logits, caches = step(caches, tokens[:, place], np.array([place], np.int32))
    assert_close(logits, expected[:, place])


def test_which_rows_are_slow_alone(make_model):
  """One row, bfloat16, CPU."""
  low, full_precision = make_model(dtype='bfloat16')[0], make_model()[0]
  assert decode.alone_is_slow(low, 1)
  assert not decode.alone_is_slow(low, 2)
  assert not decode.alone_is_slow(full_precision, 1)


def test_window_cache_is_shorter_than_the_text(make_model):
  """The ring above really went round: it holds 7 tokens of 19."""
  decoder, _ = make_model('window')
  caches = jax.tree.leaves(fresh_caches(decoder, 3, LENGTH))
  sizes = {leaf.shape[-1] for leaf in caches if leaf.dtype == jnp.int32}
  assert sizes == {7}


def test_some_experts_get_no_token(make_model):
  """The models of these tests have such experts, in the full forward too."""
  decoder, variables = make_model()
  context = text_context(jnp.asarray(tokens_of(2)))
  _, reported = decoder.apply(variables, context, mutable=['observed'])
  (load,) = jax.tree.leaves(reported['observed'])
  load = np.asarray(load).reshape(-1)
  assert load.sum() == 2 * 2 * LENGTH
  assert not load[-4:].any()


@pytest.mark.parametrize('remat', [EveryLayer(), SquareRoot()])
def test_rematerialised_models_decode(make_model, remat):
  """Their layers may be grouped otherwise; caches follow."""
  decoder, variables = make_model(depth=6, remat=remat)
  tokens = tokens_of(1, 5)
  expected = full(decoder, variables, tokens)
  caches = fresh_caches(decoder, 1, 5)
  for place in range(5):
    at = np.array([place], np.int32)
    logits, caches = jit_decode_step(decoder, variables, caches, tokens[:, place], at)
    assert_close(logits, expected[:, place])


def test_cache_has_the_compute_dtype(make_model):
  """What is stored is in bfloat16 where the model computes in it; logits stay float32."""
  decoder, variables = make_model(dtype='bfloat16')
  caches = fresh_caches(decoder, 1, 4)
  stored = {leaf.dtype.name for leaf in jax.tree.leaves(caches)}
  assert stored == {'bfloat16', 'int32'}
  one = np.ones(1, np.int32)
  logits, caches = jit_decode_step(decoder, variables, caches, one, one - 1)
  assert logits.dtype == jnp.float32
  assert {leaf.dtype.name for leaf in jax.tree.leaves(caches)} == stored


def test_draws_depend_on_seed_row_and_index():
  """And on nothing else: not on how many rows there are."""
  logits = np.zeros((64, 1000), np.float32)

  def draw(seed, index, rows=64):
    return np.asarray(choose(Sample(), jnp.asarray(logits[:rows]), seed, index))

  base = draw(0, 0)
  np.testing.assert_array_equal(draw(0, 0, 5), base[:5])
  for other in (draw(1, 0), draw(0, 1)):
    assert (other != base).sum() > 50
  assert len(set(base.tolist())) > 50
