"""What was fed last can be taken back: going on from an earlier position is as if it never was."""

import functools

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.infer.decode import fresh_caches, jit_full_logits, jit_prefill
from deepseek_jax.layers.moe.router.expert_attention import ExpertAttention

KINDS = (
  'mla',
  'window',
  'gated',
  'mha',
  'top_k',
  'dsa',
  'dsa_shared',
  'shared_window',
  'hca',
  'csa',
  'nsa',
)
VOCAB, LENGTH, ROWS, SPARE = 61, 22, 16, 2
# (place after the prompt, how many of the three tokens fed there are right)
FEEDS = ((0, 1), (1, 1), (2, 2), (4, 3), (7 - SPARE, 1))


@functools.cache
def drawn():
  rng = np.random.default_rng(4)
  return rng.integers(0, VOCAB, LENGTH, np.int32), rng.integers(0, VOCAB, (5, ROWS, 3), np.int32)


def largest_error(decoder, variables, spare):
  """Row b has a prompt of b + 1 tokens, so that every edge of a block or window is gone back over.

  Some tokens are fed, some of them wrong, and again from the first wrong one; at last from right
  ones too. Returns the largest error of the logits that follow, relative to the largest logit.
  """
  tokens, wrong = drawn()
  count = np.full(1, LENGTH, np.int32)
  want = np.asarray(jit_full_logits(decoder, variables, tokens[None], count))[0]
  lengths = np.arange(1, ROWS + 1, dtype=np.int32)
  caches = fresh_caches(decoder, ROWS, LENGTH + SPARE, spare)
  block = np.broadcast_to(tokens[:ROWS], (ROWS, ROWS))
  _, caches = jit_prefill(decoder, variables, caches, block, 0 * lengths, lengths)
  three, whole = np.arange(3), np.full(ROWS, 3, np.int32)
  for (place, right), other in zip(FEEDS, wrong):
    start = lengths + np.int32(place)
    block = tokens[np.minimum(start[:, None] + three, LENGTH - 1)]
    block = np.where(three < right, block, other)
    _, caches = jit_prefill(decoder, variables, caches, block, start, whole)
  errors = []
  for place in (6, 7):
    start = lengths + np.int32(place)
    inside = start < LENGTH
    block = np.pad(tokens[np.minimum(start, LENGTH - 1)][:, None], ((0, 0), (0, 2)))
    logits, caches = jit_prefill(decoder, variables, caches, block, start, whole // 3)
    errors.append(np.abs(np.asarray(logits)[inside] - want[start[inside]]).max())
  return max(errors) / np.abs(want).max()


@pytest.mark.parametrize('kind', KINDS)
def test_tokens_are_taken_back(make_model, kind):
  assert largest_error(*make_model(kind), SPARE) < 1e-5


def test_a_router_forgets_too(make_model):
  """Its running mean is that of the tokens that stand."""
  model = make_model('mla', router=ExpertAttention(dim=6))
  assert largest_error(*model, SPARE) < 1e-5
  assert largest_error(*model, 0) > 1e-3


@pytest.mark.parametrize('kind', ['window', 'csa'])
def test_there_must_be_room(make_model, kind):
  """A ring without spare slots has lost what the right tokens need: the test above can fail."""
  assert largest_error(*make_model(kind), 0) > 1e-3


def test_a_sum_is_not_taken_apart(make_model):
  """The memory that cannot go back says so."""
  decoder, _ = make_model('recurrent')
  with pytest.raises(ConfigError, match='Recurrent cannot take tokens back'):
    fresh_caches(decoder, 1, 8, 1)
  fresh_caches(decoder, 1, 8, 0)
