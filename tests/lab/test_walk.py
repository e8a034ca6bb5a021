"""Layers one at a time are the model."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import lab
from deepseek_jax.core.config import ConfigError
from deepseek_jax.lab.walk import context_of, passage, piece_of, read_out, walk
from deepseek_jax.layers.context import text_context
from deepseek_jax.models.remat import SquareRoot

TEXT = 'The number 7'


def test_the_last_stream_gives_the_logits(model):
  """Every layer is visited once, in order, with the weights that the scan gives it."""
  text = passage(model, TEXT)
  visits = list(walk(model, text.context))
  assert [visit.layer for visit in visits] == [-1, 0, 1, 2]
  logits = read_out(model, visits[-1].stream, text.context)[0]
  np.testing.assert_allclose(logits, model.logits(TEXT), rtol=1e-4, atol=1e-4)
  # Each layer does something, so that skipping one would be seen.
  for before, after in itertools.pairwise(visits):
    assert np.abs(np.asarray(after.stream - before.stream)).max() > 0.05


def test_another_grouping_is_the_same_walk(model):
  """Rematerialisation groups the scans otherwise; addresses are canonical."""
  grouped = lab.Pretrained(
    experiment=dataclasses.replace(model.experiment, remat=SquareRoot()),
    variables=model.variables,
  )
  text = passage(model, TEXT)
  (*_, plain), (*_, other) = (walk(one, text.context) for one in (model, grouped))
  np.testing.assert_array_equal(plain.stream, other.stream)


def test_a_batch_keeps_its_documents(model, packed):
  """Packed rows and padding come with positions and segments of their own."""
  context = context_of(model, packed)
  assert set(np.unique(packed.segments)) >= {0, 1, 2}
  np.testing.assert_array_equal(context.segments, packed.segments)
  np.testing.assert_array_equal(context.positions, packed.positions)


def test_pieces_are_what_is_read(model):
  """Bos first; ids that stand for no text have names."""
  text = passage(model, 'ab')
  assert text.pieces == ('⟨bos⟩', 'a', 'b')
  np.testing.assert_array_equal(text.context.tokens[0, 1:], [3 + 97, 3 + 98])
  same = passage(model, text.context.tokens[0].tolist())
  np.testing.assert_array_equal(same.context.tokens, text.context.tokens)
  assert piece_of(model.tokenizer, model.tokenizer.eos) == '⟨eos⟩'
  assert piece_of(model.tokenizer, 263) == '⟨263⟩'
  assert text_context(jnp.zeros((1, 3), jnp.int32)).positions.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize('prompt', [[], [264], [-1]])
def test_unknown_tokens_are_refused(model, prompt):
  """A look-up out of range would give some other row without a word."""
  with pytest.raises(ConfigError, match='from 0 to 263'):
    passage(model, prompt)
