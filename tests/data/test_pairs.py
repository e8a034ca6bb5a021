"""Prompts are read and not learnt, through cache, packing and batches; bad rows are named."""

import gzip
import json

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.pairs import Pairs
from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.data.tokenizer import Bytes


def write(path, rows) -> None:
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')


def pairs(count: int) -> list[dict[str, str]]:
  """Prompts of all lengths from none, completions too."""
  noise = np.random.default_rng(count)
  letters = np.array(list('abcdé '))
  draw = lambda most: ''.join(noise.choice(letters, noise.integers(0, most)))  # noqa: E731
  return [{'prompt': draw(40), 'completion': draw(30) + str(i)} for i in range(count)]


@pytest.mark.parametrize('length', [7, 24, 64])
def test_weights_cover_the_completions_and_nothing_else(tmp_path, length, cache_dir):
  """Every target of every pair against the bytes of the file, in every packing."""
  rows = pairs(60)
  write(tmp_path / 'pairs.jsonl', rows)
  source = Pairs(str(tmp_path / '*.jsonl'), heldout_fraction=0.3)
  corpus = TextCorpus(source=source, tokenizer=Bytes(), length=length, batch_size=4)
  data = corpus.prepare(cache_dir)
  tokenizer = data.tokenizer
  both = 0
  for split in (data.train, data.heldout):
    assert split.prompted
    batch = split.batch(range(split.rows))
    learnt = batch.weights > 0
    assert set(np.unique(batch.weights)) == {0.0, 1.0}
    expected, size = [], 0
    for title in split.titles:
      row = rows[int(title.split(':')[1]) - 1]
      text = row['completion'].encode('utf-8')
      expected += [*tokenizer.encode(row['completion']).tolist(), tokenizer.eos]
      size += len(text)
    assert sorted(batch.targets[learnt].tolist()) == sorted(expected)
    assert split.targets == len(expected) == learnt.sum()
    assert split.text_bytes == size
    # What is read is all of it: inputs in the order of their pair are the pair without its end.
    for number, title in enumerate(split.titles):
      row = rows[int(title.split(':')[1]) - 1]
      whole = [tokenizer.bos, *tokenizer.encode(row['prompt'] + row['completion']).tolist()]
      here = batch.documents == number
      assert sorted(batch.tokens[here].tolist()) == sorted(whole)
      given = 1 + len(row['prompt'].encode('utf-8'))
      assert learnt[here].sum() == len(whole) - given + 1
      if length == 64 and len(whole) <= length:
        np.testing.assert_array_equal(batch.tokens[here], whole)
        np.testing.assert_array_equal(learnt[here], np.arange(1, len(whole) + 1) >= given)
    both += split.documents
  assert both == 60


def test_bits_per_byte_are_those_of_the_completions(tmp_path, cache_dir):
  write(tmp_path / 'p.jsonl', [{'prompt': 'x' * 50, 'completion': f'{i}abc'} for i in range(9)])
  corpus = TextCorpus(
    source=Pairs(str(tmp_path / 'p.jsonl'), heldout_fraction=0.5), tokenizer=Bytes(), length=80
  )
  split = corpus.prepare(cache_dir).heldout
  # 4 bytes and the end of each: at 1 bit a token, 5 / 4 bits a byte.
  assert split.targets == 5 * split.documents
  assert split.bits_per_byte(np.log(2.0) * split.targets) == pytest.approx(5 / 4)


def test_pairs_of_one_prompt_stay_on_one_side(tmp_path):
  rows = [{'prompt': f'q{i % 10}', 'completion': f'a{i}'} for i in range(80)]
  write(tmp_path / 'p.jsonl', rows)
  source = Pairs(str(tmp_path / 'p.jsonl'), heldout_fraction=0.4)
  sides = [{d.prompt for d in source.documents(split)} for split in ('train', 'heldout')]
  assert all(sides)
  assert not sides[0] & sides[1]
  # With one prompt for all, the completions decide.
  write(tmp_path / 'one.jsonl', [{'prompt': '', 'completion': f'a{i}'} for i in range(80)])
  source = Pairs(str(tmp_path / 'one.jsonl'), heldout_fraction=0.4)
  counts = [len(list(source.documents(split))) for split in ('train', 'heldout')]
  assert sum(counts) == 80
  assert min(counts) > 10


def test_keys_packings_and_blank_lines(tmp_path):
  lines = ['{"q": "1+1=", "a": "2"}', '', '{"q": "2+2=", "a": "4", "more": 1}']
  (tmp_path / 'p.jsonl.gz').write_bytes(gzip.compress('\n'.join(lines).encode()))
  source = Pairs(f'{tmp_path}/*.gz', heldout_fraction=0.5, prompt='q', completion='a')
  found = [d for split in ('train', 'heldout') for d in source.documents(split)]
  assert sorted((d.prompt, d.text, d.title) for d in found) == [
    ('1+1=', '2', 'p.jsonl.gz:1'),
    ('2+2=', '4', 'p.jsonl.gz:3'),
  ]
  other = Pairs(f'{tmp_path}/*.gz', heldout_fraction=0.5, prompt='a', completion='q')
  assert other.fingerprint() != source.fingerprint()


GOOD = '{"prompt": "a", "completion": "b"}'


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"prompt": "a"', 'p.jsonl:2: not JSON at column'),
    ('["a", "b"]', 'p.jsonl:2: expected a JSON object, found list'),
    ('{"prompt": "a", "completio": "b"}', "p.jsonl:2: no field 'completion'; .*did you mean"),
    ('{"completion": "b"}', "p.jsonl:2: no field 'prompt'"),
    ('{"prompt": 3, "completion": "b"}', "p.jsonl:2: field 'prompt' is int, expected a text"),
    ('{"prompt": "a", "completion": null}', "p.jsonl:2: field 'completion' is NoneType"),
    ('{"prompt": "a", "completion": ""}', "p.jsonl:2: field 'completion' is empty"),
    ('{"prompt": "a", "completion": "\\ud800"}', 'p.jsonl:2: half a surrogate pair'),
    ('{"prompt": "a\0", "completion": "b"}', 'p.jsonl:2: binary data'),
  ],
)
def test_bad_rows_are_named(tmp_path, line, message):
  (tmp_path / 'p.jsonl').write_text(f'{GOOD}\n{line}\n{GOOD}\n')
  with pytest.raises(ConfigError, match=message):
    list(Pairs(f'{tmp_path}/p.jsonl').documents('train'))


def test_bad_files(tmp_path):
  (tmp_path / 'empty.jsonl').write_text('\n')
  with pytest.raises(ConfigError, match=r'empty\.jsonl: the file is empty'):
    list(Pairs(f'{tmp_path}/*.jsonl').documents('train'))
  (tmp_path / 'plain.txt').write_text('hello')
  with pytest.raises(ConfigError, match=r'plain\.txt: prompts and completions come in \.jsonl'):
    list(Pairs(f'{tmp_path}/*.txt').documents('train'))
  (tmp_path / 'same.jsonl').write_text(f'{GOOD}\n{GOOD}\n')
  with pytest.raises(ConfigError, match='all 2 documents are the same'):
    list(Pairs(f'{tmp_path}/same.jsonl').documents('train'))


@pytest.mark.parametrize(
  'fields',
  [
    {'pattern': ''},
    {'pattern': 'a', 'heldout_fraction': 0.0},
    {'pattern': 'a', 'prompt': ''},
    {'pattern': 'a', 'prompt': 'completion'},
  ],
)
def test_bad_settings(fields):
  with pytest.raises(ConfigError, match='Pairs'):
    Pairs(**fields)
