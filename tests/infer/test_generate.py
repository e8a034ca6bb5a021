"""Prompts are continued as the model says, alone or together, and wrong ones are refused."""

import jax
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.infer.decode import jit_decode_step, jit_full_logits, jit_prefill
from deepseek_jax.infer.generate import TextGenerator, generate, sample_texts, score, stream
from deepseek_jax.infer.prompt import bucket
from deepseek_jax.infer.sample import Greedy, Sample, Within

PROMPTS = [[0, 5, 9], [0], [0, 7, 7, 3, 1, 60, 22, 8]]
NEW = 6


def test_greedy_is_the_argmax_of_the_full_forward(model):
  """Each token is the most likely one after prompt and tokens so far, for unequal prompts."""
  decoder, variables = model
  continued = generate(decoder, variables, PROMPTS, max_new_tokens=NEW)
  assert [len(row) for row in continued] == [NEW] * 3
  for prompt, new in zip(PROMPTS, continued):
    tokens = np.zeros((1, 16), np.int32)
    whole = prompt + new
    tokens[0, : len(whole)] = whole
    logits = jit_full_logits(decoder, variables, tokens, np.array([len(whole)], np.int32))
    best = np.argmax(np.asarray(logits[0]), axis=-1)
    assert best[len(prompt) - 1 : len(whole) - 1].tolist() == new


@pytest.mark.parametrize('sampler', [Greedy(), Sample()])
def test_neighbours_change_nothing(model, sampler):
  """A row's text depends on the seed and its number, not on the rows beside it or their length."""
  decoder, variables = model
  together = generate(decoder, variables, PROMPTS, max_new_tokens=NEW, sampler=sampler, seed=3)
  for rows in (1, 2):
    fewer = generate(
      decoder, variables, PROMPTS[:rows], max_new_tokens=NEW, sampler=sampler, seed=3
    )
    assert fewer == together[:rows]
  long = [*PROMPTS[:2], [4] * 17]
  beside = generate(decoder, variables, long, max_new_tokens=NEW, sampler=sampler, seed=3)
  assert beside[:2] == together[:2]


def test_seeds(model):
  """The same seed gives the same tokens; another, or another row, gives others."""
  decoder, variables = model
  same = [[0, 5]] * 3

  def draw(seed):
    return generate(decoder, variables, same, max_new_tokens=NEW, sampler=Sample(), seed=seed)

  first = draw(1)
  assert draw(1) == first
  assert draw(2) != first
  assert len({tuple(row) for row in first}) == 3


def test_chunked_prefill_changes_nothing(model):
  """Prompts that end in different chunks are continued as in one block."""
  decoder, variables = model
  whole = generate(decoder, variables, PROMPTS, max_new_tokens=NEW)
  assert generate(decoder, variables, PROMPTS, max_new_tokens=NEW, prefill_chunk=3) == whole


def test_stop_tokens(model):
  """A row ends before its first stop token; the others go on; a stop token is not in the result."""
  decoder, variables = model
  free = generate(decoder, variables, PROMPTS, max_new_tokens=NEW)
  stop = frozenset({free[0][2], 59})
  expected = []
  for row in free:
    ends = [place for place, token in enumerate(row) if token in stop]
    expected.append(row[: ends[0]] if ends else row)
  assert len(expected[0]) < NEW
  assert max(map(len, expected)) == NEW
  assert generate(decoder, variables, PROMPTS, max_new_tokens=NEW, stop=stop) == expected
  everything = frozenset(range(61))
  assert generate(decoder, variables, PROMPTS, max_new_tokens=NEW, stop=everything) == [[], [], []]


def test_stopping_saves_work(model, monkeypatch):
  """When all rows have ended, no further step is made than the one already sent off."""
  decoder, variables = model
  steps = []

  def counting(*arguments):
    steps.append(1)
    return jit_decode_step(*arguments)

  monkeypatch.setattr('deepseek_jax.infer.generate.jit_decode_step', counting)
  everything = frozenset(range(61))
  generate(decoder, variables, PROMPTS, max_new_tokens=NEW, stop=everything)
  assert len(steps) == 1
  generate(decoder, variables, PROMPTS, max_new_tokens=NEW)
  assert len(steps) == 1 + NEW - 1


def test_stream_yields_tokens_as_they_come(model):
  """Step by step, all rows of a step before the next."""
  decoder, variables = model
  whole = generate(decoder, variables, PROMPTS, max_new_tokens=NEW)
  pairs = list(stream(decoder, variables, PROMPTS, max_new_tokens=NEW))
  assert pairs == [(row, whole[row][step]) for step in range(NEW) for row in range(3)]
  first = next(stream(decoder, variables, PROMPTS, max_new_tokens=NEW))
  assert first == (0, whole[0][0])


def test_one_compilation_for_many_prompts(model):
  """Lengths within a bucket, seeds and samplers do not compile the model again."""
  decoder, variables = model
  generate(decoder, variables, [[0] * 4], max_new_tokens=4)
  sizes = jit_decode_step._cache_size(), jit_prefill._cache_size()
  for length, sampler in ((1, Greedy()), (7, Sample(top_k=4)), (12, Sample(temperature=0.5))):
    generate(decoder, variables, [[0] * length], max_new_tokens=4, sampler=sampler, seed=length)
  assert (jit_decode_step._cache_size(), jit_prefill._cache_size()) == sizes
  generate(decoder, variables, [[0] * 13], max_new_tokens=4)
  assert jit_decode_step._cache_size() == sizes[0] + 1


def test_buckets():
  """Few sizes, each at least the length."""
  assert [bucket(n) for n in (1, 16, 17, 512, 513, 1025)] == [16, 16, 32, 512, 1024, 1536]


def test_score_is_the_full_forward(model):
  """For each prompt the logits after each of its tokens, whatever it was padded with."""
  decoder, variables = model
  rows = score(decoder, variables, PROMPTS)
  assert [row.shape for row in rows] == [(3, 61), (1, 61), (8, 61)]
  alone = score(decoder, variables, PROMPTS[2:])[0]
  np.testing.assert_allclose(rows[2], alone, atol=1e-5)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'prompts': []}, 'prompts: found none'),
    ({'prompts': [[0], []]}, 'prompt 1: found 0 tokens, expected at least 1; .*bos'),
    ({'prompts': [[0], [0, 61]]}, 'prompt 1: found token id 61, expected 0 to 60'),
    ({'prompts': [[0, -1]]}, 'prompt 0: found token id -1'),
    ({'prompts': [[0.5]]}, 'prompt 0: found float64 ids'),
    ({'prompts': ['text']}, "prompt 0: found 'text'"),
    ({'prompts': [3]}, 'prompt 0: found 3'),
    ({'max_new_tokens': 0}, 'max_new_tokens: found 0, expected at least 1'),
    ({'prefill_chunk': 0}, 'prefill_chunk: found 0'),
    ({'seed': -1}, 'seed: found -1'),
    ({'seed': 2**32}, 'seed: found 4294967296'),
  ],
)
def test_wrong_arguments_are_refused_at_once(model, arguments, message):
  """Before anything runs, also when streaming."""
  given = {'prompts': [[0]], 'max_new_tokens': 1} | arguments
  with pytest.raises(ConfigError, match=message):
    stream(*model, **given)


def test_all_faults_are_told_together(model):
  """One error lists them."""
  with pytest.raises(ConfigError) as caught:
    generate(*model, [[], [99]], max_new_tokens=0)
  assert len(caught.value.messages) == 3


def test_weights_on_a_mesh(model):
  """Weights that lie on several devices, as in training, give the same tokens, and compile once."""
  decoder, variables = model
  expected = generate(decoder, variables, PROMPTS, max_new_tokens=NEW)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('data',))

  def spread(leaf):
    axis = 'data' if leaf.ndim and leaf.shape[0] % 2 == 0 else None
    spec = jax.sharding.PartitionSpec(*[axis][: leaf.ndim])
    return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

  sharded = jax.tree.map(spread, variables)
  before = jit_decode_step._cache_size()
  assert generate(decoder, sharded, PROMPTS, max_new_tokens=NEW) == expected
  assert jit_decode_step._cache_size() == before + 1


@pytest.fixture
def generator(make_model):
  """A model of bytes, whose vocabulary is larger than the tokenizer's."""
  decoder, variables = make_model('window', vocab=264)
  return TextGenerator(decoder=decoder, variables=variables, tokenizer=Bytes().build())


def test_text_is_streamed_as_it_is_completed(generator):
  """The pieces of a row make its completion; every token has a piece."""
  options = {'max_new_tokens': 12, 'sampler': Sample(), 'seed': 4}
  texts = ['To be', '', 'naïve ']
  whole = generator.complete(texts, **options)
  pieces = list(generator.stream(texts, **options))
  for row in range(3):
    mine = [piece for piece in pieces if piece.row == row]
    assert ''.join(piece.text for piece in mine) == whole[row]
    assert sum(piece.token is not None for piece in mine) == 12
  ids = generate(
    generator.decoder,
    generator.variables,
    [generator.encode(text) for text in texts],
    max_new_tokens=12,
    sampler=Within(vocab=259, sampler=Sample()),
    seed=4,
  )
  assert [generator.tokenizer.decode(row) for row in ids] == whole


def test_stop_texts_end_a_row(generator):
  """Before their first occurrence, even across tokens; the other row goes on."""
  options = {'max_new_tokens': 12, 'sampler': Sample(), 'seed': 4}
  free = generator.complete(['a', 'b'], **options)
  stop = free[0][3:5]
  assert len(stop) == 2
  assert stop not in free[1]
  stopped = generator.complete(['a', 'b'], **options, stop_texts=[stop])
  assert stopped == [free[0][: free[0].index(stop)], free[1]]
  with pytest.raises(ConfigError, match='stop_texts'):
    generator.complete(['a'], max_new_tokens=1, stop_texts=[''])
  with pytest.raises(ConfigError, match='texts'):
    generator.complete('a', max_new_tokens=1)


def test_samples_during_training(generator):
  """New weights give new texts and compile nothing."""
  g = generator

  def sample(variables):
    return sample_texts(g.decoder, variables, g.tokenizer, ('To', 'be'), 8, Sample(), 1)

  first = sample(g.variables)
  assert [row['prompt'] for row in first] == ['To', 'be']
  expected = g.complete(['To', 'be'], max_new_tokens=8, sampler=Sample(), seed=1)
  assert [row['text'] for row in first] == expected
  sizes = jit_decode_step._cache_size(), jit_prefill._cache_size()
  params = jax.tree.map(lambda x: -x, g.variables['params'])
  assert sample(g.variables | {'params': params}) != first
  assert (jit_decode_step._cache_size(), jit_prefill._cache_size()) == sizes
  assert sample_texts(g.decoder, g.variables, g.tokenizer, (), 8, Sample(), 1) == []
