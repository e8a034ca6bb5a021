"""Scores by source: exact answers are what greedy decoding writes; pairs are ranked by hand."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import image_text, visual_questions
from deepseek_jax.data.media.made import Made
from deepseek_jax.data.media.question import Questions
from deepseek_jax.data.packed_split import heldout_batches
from deepseek_jax.infer.media_score import answers, measure_media
from deepseek_jax.infer.target import context_of, shuffled_media
from deepseek_jax.models.decoder import init_variables


@pytest.fixture(scope='module')
def made(cache_dir):
  """A small set of questions, a model and weights."""
  data = dataclasses.replace(
    visual_questions.get_config().data,
    source=Questions(made=Made(train=20, heldout=9)),
    batch_size=2,
  ).prepare(cache_dir)
  decoder = visual_questions.get_config().model.build()
  variables = nn.meta.unbox(jax.jit(lambda k: init_variables(decoder, k))(jax.random.key(0)))
  return data, decoder, variables


def test_answers_by_hand(made):
  """Nats, tokens and errors of each document, from the logits of its row."""
  data, decoder, variables = made
  found = answers(decoder, variables, data.heldout)
  assert found.nats.shape == (9,)
  nats, tokens, wrong = np.zeros(9), np.zeros(9), np.zeros(9)
  run = jax.jit(
    lambda c: decoder.apply(variables, c, method=lambda m, c: m.logits(m(c)[0], c)).astype('f')
  )
  for batch in heldout_batches(data.heldout, 2):
    logits = np.asarray(run(context_of(batch)), np.float64)
    for b, t in np.argwhere(np.asarray(batch.weights) > 0):
      row, target = logits[b, t], int(batch.targets[b, t])
      document = int(batch.documents[b, t])
      nats[document] += np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
      tokens[document] += 1
      wrong[document] += row.argmax() != target
  np.testing.assert_allclose(found.nats, nats, rtol=1e-4)
  np.testing.assert_array_equal(found.tokens, tokens)
  np.testing.assert_array_equal(found.wrong, wrong)
  assert (tokens > 0).all()
  assert found.nats_per_token == pytest.approx(nats.sum() / tokens.sum(), rel=1e-4)
  assert found.exact == (wrong == 0).mean()


def test_media_of_another_row(made):
  """Rows change pictures with rows that show as many; nothing else changes."""
  data, _, _ = made
  batch = next(iter(heldout_batches(data.heldout, 2)))
  other = shuffled_media(batch)
  np.testing.assert_array_equal(other.tokens, batch.tokens)
  counts = np.asarray(batch.media['image'].counts)
  np.testing.assert_array_equal(other.media['image'].counts > 0, counts > 0)
  if (counts[0] > 0).tolist() == (counts[1] > 0).tolist():
    np.testing.assert_array_equal(
      other.media['image'].values, np.asarray(batch.media['image'].values)[::-1]
    )


def test_figures(made, cache_dir):
  """One entry a source; of two towers, an untrained one finds about what chance finds."""
  data, decoder, variables = made
  figures, written = measure_media(decoder, variables, data)
  assert set(figures) == {'Questions'}
  assert figures['Questions']['documents'] == 9
  assert [row['document'] for row in written] == list(range(9))
  same = [row['text'] == row['reference'] for row in written]
  assert figures['Questions']['exact'] == np.mean(same)
  assert all(0 <= figures['Questions'][name] <= 1 for name in ('f1', 'shuffled_f1', 'constant_f1'))
  experiment = image_text.get_config()
  source = experiment.data.source.shares[1].source
  source = dataclasses.replace(source, made=Made(train=20, heldout=8))
  pairs = dataclasses.replace(experiment.data, source=source, batch_size=4).prepare(cache_dir)
  towers = experiment.model.build()
  weights = nn.meta.unbox(jax.jit(lambda k: init_variables(towers, k))(jax.random.key(0)))
  found = measure_media(towers, weights, pairs)[0]['Scenes']
  assert 2 <= found['candidates'] <= 8
  assert 0 <= found['recall_1'] <= found['recall_5'] <= 1
  assert 0 <= found['matching'] <= 1
