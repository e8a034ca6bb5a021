"""Captions: what a cache remembers of a picture is enough, and how they are scored."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import tiny_caption
from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.captions import ImageCaptions
from deepseek_jax.data.drawing import OpenClipart
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.infer.caption import caption, caption_nats, read_pictures, sample_captions
from deepseek_jax.infer.caption_score import (
  best_constant,
  bootstrap_error,
  keyword_f1,
  keywords_of,
  measure_captions,
  other_pictures,
)
from deepseek_jax.infer.decode import fresh_caches, jit_decode_step
from deepseek_jax.sharding.rules import Rules
from deepseek_jax.train.objective import batch_context

TOLERANCE = 1e-5


@pytest.fixture(scope='module')
def data(cache_dir):
  """Few pictures with captions of bytes."""
  return ImageCaptions(
    source=OpenClipart(folders=('plants',)), tokenizer=Bytes(), slots=4, length=96, batch_size=5
  ).prepare(cache_dir)


@pytest.fixture(scope='module')
def seeing(draw_variables):
  """A model with random weights, whose captions depend on the picture."""
  decoder = tiny_caption.get_config().model.build()
  return decoder, draw_variables(decoder)


@pytest.fixture(scope='module')
def logits(seeing, data):
  """A batch, and the logits [B, T, V] of the whole forward pass."""
  decoder, variables = seeing
  batch = data.train.batch(range(5))
  context = batch_context(batch, Rules())
  run = jax.jit(lambda v: decoder.apply(v, context, method=lambda m, c: m.logits(m(c)[0], c)))
  return batch, np.asarray(run(variables))


def test_decode_is_the_forward_pass_at_every_position(seeing, logits):
  decoder, variables = seeing
  batch, expected = logits
  caches = fresh_caches(decoder, 5, 96)
  found, caches = read_pictures(decoder, variables, caches, batch, np.int32(4))
  limit = TOLERANCE * np.abs(expected).max()
  assert np.abs(np.asarray(found) - expected[:, 4]).max() <= limit
  ends = batch.segments.sum(axis=1)
  for place in range(5, ends.max()):
    at = np.full(5, place, np.int32)
    found, caches = jit_decode_step(decoder, variables, caches, batch.tokens[:, place], at)
    going = place < ends
    assert np.abs(np.asarray(found)[going] - expected[going, place]).max() <= limit


def test_the_pictures_matter(seeing, logits):
  """Of every row, to every word of its caption; otherwise the test above shows nothing."""
  decoder, variables = seeing
  batch, _ = logits
  shown = batch.media['image']
  shown = shown.replace(values=np.roll(shown.values, 1, axis=0))
  other = dataclasses.replace(batch, media={'image': shown})
  found, strange = (np.asarray(caption_nats(decoder, variables, b)) for b in (batch, other))
  assert (np.abs(found - strange) > 1e-3).all()


def test_nats(seeing, logits):
  """Against the logits, a target at a time."""
  decoder, variables = seeing
  batch, expected = logits
  want = np.zeros(5)
  for b, t in np.argwhere(batch.weights > 0):
    scores = expected[b, t].astype(np.float64)
    want[b] += np.log(np.exp(scores).sum()) - scores[batch.targets[b, t]]
  np.testing.assert_allclose(caption_nats(decoder, variables, batch), want, rtol=1e-5)


def test_captions_are_greedy(seeing, data, logits):
  """The caption of the model is what its forward pass prefers, word by word; not the true one."""
  decoder, variables = seeing
  batch, expected = logits
  texts = caption(decoder, variables, data.tokenizer, batch, 4)
  first = [data.tokenizer.decode([int(i)]) for i in expected[:, 4, :259].argmax(axis=-1)]
  assert [text[:1] for text in texts] == [letter[:1] for letter in first]
  blind = dataclasses.replace(batch, tokens=np.where(batch.placeholders >= 0, batch.tokens, 0))
  blind = dataclasses.replace(blind, targets=blind.targets * 0)
  assert caption(decoder, variables, data.tokenizer, blind, 4) == texts
  with pytest.raises(ConfigError, match='media'):
    caption(decoder, variables, data.tokenizer, dataclasses.replace(batch, media=None), 4)


def test_samples(seeing, data):
  rows = sample_captions(*seeing, data.heldout, 3)
  assert len(rows) == 3
  for row in rows:
    assert row.keys() == {'image', 'prompt', 'text', 'reference'}
    assert row['image'].startswith('data:image/webp;base64,UklGR')
  known = [record['caption'] for record in data.heldout.records]
  assert all(row['reference'] in known for row in rows)


def test_keywords():
  assert keywords_of('food, fruit: red apple, big') == {'food', 'fruit'}
  assert keywords_of('') == set()
  found = keyword_f1(['a, b: x', 'c', ''], [{'a', 'c'}, {'d'}, {'e'}])
  np.testing.assert_allclose(found, [0.5, 0, 0])


def test_no_row_gets_its_own_drawing():
  drawings = list('aabbbcddddefghijkl')
  others = other_pictures(drawings)
  assert sorted(others) == list(range(len(drawings)))
  assert all(drawings[i] != drawings[j] for i, j in enumerate(others))
  assert (others != other_pictures(drawings, seed=1)).any()


def test_bootstrap_is_the_standard_error_of_groups():
  rng = np.random.default_rng(0)
  means = rng.normal(size=400)
  values = np.repeat(means, 3)
  groups = [str(i // 3) for i in range(1200)]
  found = bootstrap_error(values, groups, np.ones(1200))
  # Rows of a group are one observation, not three.
  assert found == pytest.approx(means.std() / 20, rel=0.1)


def test_best_constant(data):
  true = [set(record['keywords']) for record in data.train.records]
  constant = best_constant(true)
  assert keyword_f1([', '.join(constant)] * len(true), true).mean() > 0.3
  assert 'plants' in constant


def test_measure(seeing, data):
  """Of a model that knows nothing: the figures fit together, and its captions are worth nothing."""
  figures = measure_captions(*seeing, data)
  assert figures['pictures'] == data.heldout.rows
  nats = figures['nats_per_token']
  assert nats['gap'] == pytest.approx(nats['shuffled'] - nats['own'])
  assert nats['gap_error'] > 0
  want = nats['own'] * data.heldout.targets
  assert figures['bits_per_byte'] == pytest.approx(data.heldout.bits_per_byte(want))
  f1 = figures['keyword_f1']
  assert f1['own'] < f1['constant']
