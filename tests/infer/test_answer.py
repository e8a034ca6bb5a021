"""Answers that are written token by token, against a forward pass over all that was written."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import visual_questions
from deepseek_jax.data.media.made import Made
from deepseek_jax.data.media.question import Questions
from deepseek_jax.infer.answer import words_of, write_answers
from deepseek_jax.infer.target import context_of
from deepseek_jax.models.decoder import init_variables

JOINS = [
  pytest.param(join, marks=[pytest.mark.slow] if join == 'fusion' else [])
  for join in visual_questions.JOINS
]


@pytest.mark.parametrize('join', JOINS)
def test_each_token_is_the_likeliest_of_its_prefix(join, cache_dir):
  """Greedy tokens through the cache are those of a forward pass without one, to the row's end."""
  experiment = visual_questions.get_config(join)
  data = dataclasses.replace(
    experiment.data,
    source=Questions(made=Made(train=20, heldout=5)),
    batch_size=2,
    length=48,
  ).prepare(cache_dir)
  split, decoder = data.heldout, experiment.model.build()
  variables = nn.meta.unbox(jax.jit(lambda k: init_variables(decoder, k))(jax.random.key(0)))
  texts = write_answers(decoder, variables, split, [0, 3, 4])
  assert len(texts) == 3
  run = jax.jit(lambda c: decoder.apply(variables, c, method=lambda m, c: m.logits(m(c)[0], c)))
  vocab, eos = split.tokenizer.vocab_size, split.tokenizer.eos
  for document, text in zip([0, 3, 4], texts):
    batch = split.alone([document])
    end = int((np.asarray(batch.weights)[0] > 0).argmax()) + 1
    ids = []
    for place in range(end, split.length):
      tokens = np.asarray(batch.tokens).copy()
      tokens[0, end:] = 0
      tokens[0, end:place] = ids
      segments = (np.arange(split.length) < place).astype(np.int32)[None]
      positions = np.arange(split.length, dtype=np.int32)[None]
      context = dataclasses.replace(
        context_of(batch), tokens=tokens, segments=segments, positions=positions
      )
      token = int(np.asarray(run(context))[0, place - 1, :vocab].argmax())
      if token == eos:
        break
      ids.append(token)
    assert text == split.tokenizer.decode(ids)


def test_words():
  """Words that say something, whatever their case and points."""
  assert words_of('A red Cone, left of the sphere.') == {'red', 'cone', 'left', 'sphere'}
