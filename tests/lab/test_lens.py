"""The logit lens: its last row is the model."""

import numpy as np
import pytest
from scipy import special

from deepseek_jax import lab
from deepseek_jax.models.decoder import canonical, plan_segments

TEXT = 'The number 7'


@pytest.fixture(scope='module')
def lens(model):
  """Of a short text."""
  return lab.logit_lens(model, TEXT)


def test_the_last_row_is_the_model(model, lens):
  """One row for the embedding, one a layer; each is a distribution."""
  assert lens.log_probabilities.shape == (4, len(TEXT) + 1, 264)
  expected = special.log_softmax(np.asarray(model.logits(TEXT), np.float64), axis=-1)
  np.testing.assert_allclose(lens.log_probabilities[-1], expected, atol=2e-4)
  np.testing.assert_allclose(np.exp(lens.log_probabilities).sum(axis=-1), 1.0, atol=1e-5)
  assert np.abs(np.diff(lens.log_probabilities, axis=0)).max(axis=(1, 2)).min() > 0.1


def test_the_first_row_is_read_from_the_embedding(model, lens):
  """Final norm and head, and nothing else."""
  p = canonical(model.variables['params'], plan_segments(model.experiment.model))
  x = np.asarray(p['embedding']['weight'], np.float64)[lens.tokens]
  x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * p['norm']['scale']
  expected = special.log_softmax(x @ np.asarray(p['head']['weight'], np.float64), axis=-1)
  np.testing.assert_allclose(lens.log_probabilities[0], expected, atol=2e-4)


def test_what_is_likeliest(lens):
  """In order, with probabilities; and what the text's own tokens cost."""
  rows = lens.top(-1, count=5)
  assert len(rows) == 4
  for row, chosen in zip(np.exp(lens.log_probabilities[:, -1]), rows):
    shares = [share for _, share in chosen]
    assert shares == sorted(shares, reverse=True)
    np.testing.assert_allclose(shares, np.sort(row)[::-1][:5], rtol=1e-6)
  position = TEXT.index('b')
  nats = lens.nats()
  assert nats.shape == (4, len(TEXT))
  assert nats[2, position] == -lens.log_probabilities[2, position, 3 + ord('b')]


def test_a_lens_is_drawn(lens):
  """The likeliest token stands in every field."""
  axes = lens.plot().axes[0]
  assert len(axes.texts) == 4 * (len(TEXT) + 1)
  assert axes.get_yticklabels()[1].get_text() == 'layer 0'
  assert axes.get_xticklabels()[4].get_text() == '·'
