"""Files are read whatever their packing, and errors say which file and where in it."""

import gzip
import json
import lzma

import pytest
import zstandard

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data import text_file

PACK = {
  '': lambda content: content,
  '.gz': gzip.compress,
  '.xz': lzma.compress,
  '.zst': lambda content: zstandard.ZstdCompressor(write_checksum=True).compress(content),
}


def read(path, field='text'):
  """The texts of a file."""
  return [document.text for document in text_file.documents(path, field)]


@pytest.mark.parametrize('packing', PACK)
def test_every_packing(tmp_path, packing):
  """Both kinds of file."""
  path = tmp_path / f'a.txt{packing}'
  path.write_bytes(PACK[packing]('naïve\n'.encode()))
  assert read(path) == ['naïve\n']
  path = tmp_path / f'a.jsonl{packing}'
  path.write_bytes(PACK[packing](b'{"text": "one"}\n\n{"text": "", "n": 1}\n{"text": "two"}'))
  assert read(path) == ['one', 'two']
  titles = [document.title for document in text_file.documents(path, 'text')]
  assert titles == [f'{path.name}:1', f'{path.name}:4']
  assert text_file.matches(str(tmp_path / '*')) == sorted(tmp_path.iterdir())


@pytest.mark.parametrize('packing', [p for p in PACK if p])
@pytest.mark.parametrize(
  'damage',
  [
    lambda content: content[:-9],
    lambda content: content[:20],
    lambda content: content[:25] + bytes(9) + content[34:],
    lambda content: b'not packed at all',
  ],
  ids=['cut', 'stump', 'overwritten', 'other'],
)
def test_damaged_archive(tmp_path, packing, damage):
  """Cut short, changed, or not an archive."""
  path = tmp_path / f'a.txt{packing}'
  path.write_bytes(damage(PACK[packing](b'a long text ' + bytes(range(32, 127)) * 99)))
  with pytest.raises(ConfigError, match=rf'a\.txt\{packing}: the \{packing} archive is damaged'):
    read(path)


def test_zstandard_frames_and_sizes(tmp_path):
  """Files of several frames, larger than a buffer, with lines over their borders."""
  lines = ['{"text": "' + 'x' * (i % 700) + str(i) + '"}\n' for i in range(1500)]
  content = ''.join(lines).encode()
  frames = [content[i : i + 33_331] for i in range(0, len(content), 33_331)]
  path = tmp_path / 'a.jsonl.zst'
  path.write_bytes(b''.join(PACK['.zst'](frame) for frame in frames))
  assert len(frames) > 2
  assert read(path) == [json.loads(line)['text'] for line in lines]
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(ConfigError, match='ends in the middle of a frame'):
    read(path)


def test_line_separators_inside_json_are_no_line_ends(tmp_path):
  """U+2028 and U+0085 are letters of the text."""
  path = tmp_path / 'a.jsonl'
  path.write_text(json.dumps({'text': 'a\u2028b\x85c'}, ensure_ascii=False), encoding='utf-8')
  assert read(path) == ['a\u2028b\x85c']


def test_huge_line_and_byte_order_mark(tmp_path):
  """Neither is a problem."""
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'\xef\xbb\xbf' + json.dumps({'text': 'word ' * 400_000}).encode())
  assert len(read(path)[0]) == 2_000_000


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('a.txt', b'', r'a\.txt: the file is empty'),
    ('a.txt', b' \n', r'a\.txt: the file is empty'),
    ('a.jsonl', b'', r'a\.jsonl: the file is empty'),
    ('a.jsonl', b'\n{"text": ""}\n', r'no record has any text'),
    ('a.txt', b'caf\xe9 au lait', r'a\.txt: not UTF-8 at byte 3 \(0xe9'),
    ('a.jsonl', b'{"text": "a"}\n{"text": "\xff"}\n', r'a\.jsonl:2: not UTF-8 at byte 24 \(0xff'),
    ('a.txt', b'\x7fELF\x00\x01', r'binary data \(a zero byte at byte 4\)'),
    ('a.txt', 'text'.encode('utf-16'), r'UTF-16'),
    ('a.jsonl', b'{"text": "a"}\n{"text": \n', r'a\.jsonl:2: not JSON at column'),
    ('a.jsonl', b'[1]\n', r'a\.jsonl:1: expected a JSON object, found list'),
    ('a.jsonl', b'{"texts": "a", "id": 1}', r"no field 'text'; the keys are 'texts', 'id'; did"),
    ('a.jsonl', b'{"id": 1}', r"no field 'text'; the keys are 'id'$"),
    ('a.jsonl', b'{"text": 5}', r"field 'text' is int"),
    ('a.jsonl', rb'{"text": "a\ud800"}', r'half a surrogate pair at character 1'),
  ],
)
def test_what_is_wrong_is_said(tmp_path, name, content, message):
  """File, line, byte, and what was expected."""
  path = tmp_path / name
  path.write_bytes(content)
  with pytest.raises(ConfigError, match=message):
    read(path)


def test_other_field(tmp_path):
  """The key of the text can be chosen."""
  path = tmp_path / 'a.jsonl'
  path.write_text('{"body": "x"}')
  assert read(path, 'body') == ['x']


def test_globs(tmp_path):
  """Sorted, at any depth, files only."""
  for name in ('b.txt', 'a/c.txt', 'a/d/e.TXT', 'a/d/f.txt.gz'):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('x')
  found = text_file.matches(str(tmp_path / '**'))
  assert [str(p.relative_to(tmp_path)) for p in found] == [
    'a/c.txt',
    'a/d/e.TXT',
    'a/d/f.txt.gz',
    'b.txt',
  ]


def test_no_match_shows_what_is_near(tmp_path, monkeypatch):
  """The pattern, the folder, near names."""
  (tmp_path / 'novel.txt').write_text('x')
  with pytest.raises(ConfigError, match=r"no file matches '.*novl\.txt'.*did you mean novel\.txt"):
    text_file.matches(str(tmp_path / 'novl.txt'))
  with pytest.raises(ConfigError, match=r'holds novel\.txt'):
    text_file.matches(str(tmp_path / 'missing' / '**' / '*.txt'))
  with pytest.raises(ConfigError, match='is a folder: did you mean'):
    text_file.matches(str(tmp_path))
  with pytest.raises(ConfigError, match='~ is not expanded'):
    text_file.matches('~/nowhere-at-all/*.txt')
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match=r'holds novel\.txt'):
    text_file.matches('*.md')


def test_other_names_are_refused(tmp_path):
  """A pattern that takes in what is not text is a mistake."""
  (tmp_path / 'a.txt').write_text('x')
  (tmp_path / 'a.parquet').write_text('x')
  with pytest.raises(ConfigError, match=r'matches .*a\.parquet.*; expected names ending in \.txt'):
    text_file.matches(str(tmp_path / '*'))
