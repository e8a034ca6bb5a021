"""Tokens on disk are those of the documents, and are computed once."""

import subprocess
import sys

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data import cache
from deepseek_jax.data.cache import token_cache
from deepseek_jax.data.source import TextFiles
from deepseek_jax.data.tokenizer import BPE, Bytes, ByteTokenizer

BUILDER = """
import pathlib, sys
from deepseek_jax.data import cache
from deepseek_jax.data.source import TextFiles
from deepseek_jax.data.tokenizer import Bytes

print('ready', flush=True)
sys.stdin.readline()
found = cache.token_cache(
  TextFiles(sys.argv[1]), Bytes().build(), 'train', pathlib.Path(sys.argv[2])
)
print(found.fingerprint, int(found.tokens.sum()))
"""


@pytest.fixture
def source(tmp_path):
  """Forty short documents, one with letters outside ASCII."""
  folder = tmp_path / 'text'
  folder.mkdir()
  for i in range(40):
    (folder / f'{i:02}.txt').write_text(f'naïve text {i}' * (1 + i % 5), encoding='utf-8')
  return TextFiles(str(folder / '*.txt'), heldout_fraction=0.2)


@pytest.mark.parametrize('config', [BPE(), Bytes()], ids=['BPE', 'Bytes'])
@pytest.mark.parametrize('lot', [1, 100, 10**6])
def test_tokens(source, tmp_path, config, lot, monkeypatch):
  """Each document between bos and eos, whatever the lots; bytes are of UTF-8."""
  monkeypatch.setattr(cache, '_LOT_CHARACTERS', lot)
  tokenizer = config.build()
  documents = list(source.documents('train'))
  found = token_cache(source, tokenizer, 'train', tmp_path / f'cache{lot}')
  assert found.tokens.dtype == np.uint16
  assert len(found.titles) == len(documents) > 20
  for i, document in enumerate(documents):
    ids = found.tokens[found.offsets[i] : found.offsets[i + 1]]
    assert (ids[0], ids[-1]) == (0, 1)
    assert tokenizer.decode(ids) == document.text
    assert found.text_bytes[i] == len(document.text.encode('utf-8'))
    assert (found.titles[i], found.sources[i]) == (document.title, document.source)
  assert found.offsets[-1] == len(found.tokens)


def test_large_vocabulary_is_stored_wider(source, tmp_path):
  """Ids beyond 65,535 survive."""

  class Wide(ByteTokenizer):
    def __init__(self):
      super().__init__()
      self.vocab_size, self.fingerprint = 200_000, 'wide'

    def encode_batch(self, texts):
      return [ids + 150_000 for ids in super().encode_batch(texts)]

  found = token_cache(source, Wide(), 'heldout', tmp_path / 'cache')
  assert found.tokens.dtype == np.int32
  assert found.tokens.max() > 150_000


def test_computed_once(source, tmp_path, monkeypatch):
  """Until the tokenizer, the split or the text changes; a cut file is noticed."""
  tokenizer = Bytes().build()
  first = token_cache(source, tokenizer, 'train', tmp_path / 'cache')
  (entry,) = (tmp_path / 'cache').iterdir()
  with monkeypatch.context() as patch:
    patch.setattr(ByteTokenizer, 'encode_batch', None)
    again = token_cache(source, tokenizer, 'train', tmp_path / 'cache')
  assert again.fingerprint == first.fingerprint
  expected = np.array(first.tokens)
  tokens = entry / 'tokens.npy'
  tokens.write_bytes(tokens.read_bytes()[:-10])
  rebuilt = token_cache(source, tokenizer, 'train', tmp_path / 'cache')
  np.testing.assert_array_equal(rebuilt.tokens, expected)
  prints = {
    first.fingerprint,
    token_cache(source, tokenizer, 'heldout', tmp_path / 'cache').fingerprint,
    token_cache(source, BPE().build(), 'train', tmp_path / 'cache').fingerprint,
  }
  assert len(prints) == 3


def test_two_processes_at_once(source, tmp_path):
  """Both get the same tokens."""
  command = [sys.executable, '-c', BUILDER, source.pattern, str(tmp_path / 'cache')]
  pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
  builders = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
  for builder in builders:
    assert builder.stdout.readline() == 'ready\n'
  for builder in builders:
    builder.stdin.write('go\n')
    builder.stdin.flush()
  outputs = [builder.communicate(timeout=120) for builder in builders]
  assert [builder.returncode for builder in builders] == [0, 0], outputs
  assert outputs[0][0] == outputs[1][0]
  assert len(list((tmp_path / 'cache').iterdir())) == 1


def test_progress_is_reported_when_it_takes_long(source, tmp_path, monkeypatch, capsys):
  """And only then."""
  token_cache(source, Bytes().build(), 'heldout', tmp_path / 'cache')
  assert 'tokenizing' not in capsys.readouterr().err
  clock = iter(range(0, 1000, 3))
  monkeypatch.setattr('time.monotonic', lambda: float(next(clock)))
  monkeypatch.setattr(cache, '_LOT_CHARACTERS', 1)
  token_cache(source, Bytes().build(), 'train', tmp_path / 'cache')
  lines = capsys.readouterr().err.splitlines()
  assert lines[0].startswith('tokenizing train: ')
  assert lines[-1].startswith('tokenizing train: done, ')


def test_split_without_documents_is_refused(tmp_path):
  """With a name."""

  class Empty:
    def fingerprint(self):
      return 'empty'

    def documents(self, split):
      return iter(())

  with pytest.raises(ConfigError, match='the heldout split has no document'):
    token_cache(Empty(), Bytes().build(), 'heldout', tmp_path)
