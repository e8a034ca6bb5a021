"""Expert load by class of token: no choice lost, none counted twice."""

import numpy as np
import pytest

from deepseek_jax import lab
from deepseek_jax.core.config import ConfigError
from deepseek_jax.lab.walk import context_of
from deepseek_jax.models.decoder import plan_segments
from deepseek_jax.train.report import layer_loads


@pytest.fixture(scope='module')
def load(model, packed):
  """Of a batch of packed rows, and the batch."""
  return lab.expert_load(model, packed), packed


def test_classes_add_up_to_what_the_model_observes(model, load):
  """Layer by layer and expert by expert, padding left out."""
  counted, batch = load
  context = context_of(model, batch)
  _, reported = model.decoder.apply(model.variables, context, mutable=['observed'])
  observed = layer_loads(reported['observed'], plan_segments(model.experiment.model))
  assert counted.layers == (1, 2)
  for layer, counts in zip(counted.layers, counted.counts):
    np.testing.assert_array_equal(counts.sum(axis=0), observed[f'layers/{layer}'])
    np.testing.assert_array_equal(counts.sum(axis=1), 2 * counted.tokens)
  assert counted.tokens.sum() == (np.asarray(batch.segments) > 0).sum()
  assert (np.asarray(batch.segments) == 0).any()


def test_classes_are_those_of_the_tokens(model, load):
  """Recounted from the bytes, the most frequent first; a class of one's own is a function."""
  counted, batch = load
  ids = np.asarray(batch.tokens)[np.asarray(batch.segments) > 0]
  digits = ((ids >= 3 + ord('0')) & (ids <= 3 + ord('9'))).sum()
  table = dict(zip(counted.classes, counted.tokens.tolist()))
  assert table['number'] == digits
  assert table['white space'] == (ids == 3 + ord(' ')).sum()
  assert table['capitalised'] == (ids == 3 + ord('T')).sum()
  assert table['special'] == (ids == model.tokenizer.bos).sum()
  assert list(counted.tokens) == sorted(counted.tokens, reverse=True)
  own = lab.expert_load(model, batch, classify=lambda piece: 'e' if piece == 'e' else 'other')
  assert own.classes == ('other', 'e')
  assert own.tokens[1] == (ids == 3 + ord('e')).sum()
  for mine, theirs in zip(own.counts, counted.counts):
    np.testing.assert_array_equal(mine.sum(axis=0), theirs.sum(axis=0))


def test_shares_are_of_a_class(load):
  """Rows sum to one."""
  counted, _ = load
  np.testing.assert_allclose(counted.shares(2).sum(axis=1), 1.0)
  assert counted.shares(1).shape == (len(counted.classes), 6)


def test_a_model_without_experts_is_told(make_model):
  """Nothing to count is no empty picture."""
  with pytest.raises(ConfigError, match='no layer'):
    lab.expert_load(make_model(depth=1), 'abc')


@pytest.mark.parametrize(
  ('piece', 'name'),
  [
    ('⟨bos⟩', 'special'),
    (' \n', 'white space'),
    (' 12', 'number'),
    (' LORD', 'capitalised'),
    (' lord', 'word'),
    ('ing', 'rest of a word'),
    (' —', 'punctuation'),
  ],
)
def test_token_class(piece, name):
  """One of each."""
  assert lab.token_class(piece) == name


def test_a_table_is_drawn(load):
  """One a layer; every class has its row."""
  counted, _ = load
  picture = counted.plot()
  titles = [axes.get_title(loc='left') for axes in picture.axes]
  assert titles[:2] == ['layer 1', 'layer 2']
  labels = [label.get_text() for label in picture.axes[0].get_yticklabels()]
  assert labels == list(counted.classes)
  assert picture._repr_png_().startswith(b'\x89PNG')
