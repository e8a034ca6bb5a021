"""Archives: members are found at their places, damaged ones are listed, workers read by path."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.decode import Sizes
from deepseek_jax.data.media.rows import MediaCorpus
from deepseek_jax.data.media.shards import ParquetFiles, TarShards
from deepseek_jax.data.tokenizer import Bytes

SIZES = Sizes(side=8, points=16)


def picture(shade: int) -> bytes:
  """A grey picture: its shade tells it from others."""
  stream = io.BytesIO()
  Image.new('RGB', (4, 4), (shade, shade, shade)).save(stream, 'PNG')
  return stream.getvalue()


def cloud(seed: int) -> bytes:
  """A cloud of points."""
  stream = io.BytesIO()
  np.save(stream, np.random.default_rng(seed).random((20, 3)))
  return stream.getvalue()


def shard(path, members: list[tuple[str, bytes]]) -> None:
  """Writes a tar file."""
  with tarfile.open(path, 'w') as archive:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))


def found(source, folder) -> dict:
  """Learnt text and arrays of all documents; every array is checked against its caption."""
  records = source.open(folder)
  result = {}
  for split in ('train', 'heldout'):
    for index in range(records.count(split)):
      record = records.record(split, index)
      result[record.learnt] = records.render(split, index)
  return result, {fault.name: fault.reason for fault in records.faults}


SECOND = [
  ('x/one.png', picture(100)),
  ('x/one.json', json.dumps({'caption': 'shade 100'}).encode()),
  ('y/one.png', picture(110)),
  ('y/one.txt', b'shade 110'),
  ('both.png', picture(120)),
  ('both.npy', cloud(0)),
  ('both.txt', b'shade 120'),
  ('no_caption.png', picture(1)),
  ('no_medium.txt', b'words'),
  ('bad.png', b'nothing'),
  ('bad.txt', b'shade 0'),
  ('blank.png', picture(2)),
  ('blank.txt', b' '),
  ('latin.png', picture(3)),
  ('latin.txt', b'caf\xe9'),
  ('twice.png', picture(4)),
  ('twice.png', picture(5)),
  ('twice.txt', b'shade 4'),
  ('two.png', picture(6)),
  ('two.jpg', picture(7)),
  ('two.txt', b'shade 6'),
  ('differ.png', picture(8)),
  ('differ.txt', b'shade 8'),
  ('differ.json', b'{"caption": "shade 9"}'),
]


def test_tar_shards(tmp_path):
  """Samples of two shards; captions in .txt and .json; two media in one sample."""
  first = [
    (f'{i:03}.{ending}', body)
    for i in range(6)
    for ending, body in (('png', picture(10 * i)), ('txt', f'shade {10 * i}'.encode()))
  ]
  shard(tmp_path / 'a-000.tar', first)
  shard(tmp_path / 'a-001.tar', SECOND)
  source = TarShards(
    str(tmp_path / '*.tar'), kinds=('image', 'points'), sizes=SIZES, heldout_fraction=0.3
  )
  documents, faults = found(source, tmp_path / 'cache')
  wanted = {f'shade {10 * i}' for i in range(6)} | {'shade 100', 'shade 110', 'shade 120'}
  assert documents.keys() == wanted
  for text, arrays in documents.items():
    assert (arrays[0] == int(text.split()[1])).all()
    assert len(arrays) == (2 if text == 'shade 120' else 1)
  reasons = {
    'no_caption': 'no caption',
    'no_medium': 'no image or points in it',
    'bad': 'not a readable image: ',
    'blank': 'the caption is empty',
    'latin': 'not UTF-8',
    'twice': 'two files of one name',
    'two': 'two files of the kind image',
    'differ': 'different captions in .txt and .json',
  }
  assert faults.keys() == {f'a-001.tar: {name}' for name in reasons}
  for name, reason in reasons.items():
    assert reason in faults[f'a-001.tar: {name}']
  # Rows of it, also read by another process, in which nothing is open yet.
  config = MediaCorpus(source=source, tokenizer=Bytes(), length=80, batch_size=2)
  data = config.prepare(tmp_path / 'cache')
  assert len(data.faults) == len(reasons)
  batch = pickle.loads(pickle.dumps(data.train)).batch([0])
  for kind, media in data.train.batch([0]).media.items():
    np.testing.assert_array_equal(media.values, batch.media[kind].values)


def test_a_shard_that_is_cut(tmp_path):
  """What is before the cut counts; the archive is listed."""
  shard(
    tmp_path / 'a.tar',
    [(f'{i}.{e}', b) for i in range(9) for e, b in (('png', picture(i)), ('txt', b'shade %d' % i))],
  )
  whole = (tmp_path / 'a.tar').read_bytes()
  # Two blocks a member: the cut is in the picture of sample 5.
  (tmp_path / 'a.tar').write_bytes(whole[: 1024 * 10 + 520])
  documents, faults = found(TarShards(str(tmp_path / 'a.tar'), sizes=SIZES), tmp_path / 'cache')
  assert documents.keys() == {f'shade {i}' for i in range(5)}
  assert 'a damaged archive' in faults['a.tar']


def test_wrong_patterns(tmp_path):
  (tmp_path / 'a.tar.gz').write_bytes(b'')
  for pattern, message in [('*.tar', 'no file matches'), ('*.gz', 'not compressed')]:
    with pytest.raises(ConfigError, match=message):
      TarShards(str(tmp_path / pattern)).open(tmp_path / 'cache')
  with pytest.raises(ConfigError, match='a path or a glob'):
    TarShards('')
  with pytest.raises(ConfigError, match="found 'smell'"):
    TarShards('a.tar', kinds=('smell',))
  with pytest.raises(ConfigError, match='heldout_fraction: expected between 0 and 1, found 1'):
    ParquetFiles('a.parquet', heldout_fraction=1)


def test_parquet_without_its_library(tmp_path, monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r"pyarrow: pip install 'deepseek_jax\[media\]'"):
    ParquetFiles(str(tmp_path)).open(tmp_path)


def test_parquet(tmp_path):
  """Bytes, and bytes with paths; rows that cannot be used are listed by group and row."""
  pyarrow = pytest.importorskip('pyarrow')
  from pyarrow import parquet

  rows = [(picture(10 * i), f'shade {10 * i}') for i in range(7)]
  rows += [(b'nothing', 'x'), (None, 'y'), (picture(1), None), (picture(2), '  ')]
  plain = pyarrow.table({'image': [r[0] for r in rows], 'caption': [r[1] for r in rows]})
  parquet.write_table(plain, tmp_path / 'a.parquet', row_group_size=3)
  nested = [{'bytes': picture(100 + i), 'path': f'{i}.png'} for i in range(3)]
  texts = [f'shade {100 + i}' for i in range(3)]
  parquet.write_table(pyarrow.table({'image': nested, 'caption': texts}), tmp_path / 'b.parquet')
  (tmp_path / 'c.parquet').write_bytes((tmp_path / 'a.parquet').read_bytes()[:200])
  source = ParquetFiles(str(tmp_path / '*.parquet'), sizes=SIZES, heldout_fraction=0.3)
  documents, faults = found(source, tmp_path / 'cache')
  assert documents.keys() == {f'shade {10 * i}' for i in range(7)} | set(texts)
  for text, (array,) in documents.items():
    assert (array == int(text.split()[1])).all()
  assert faults.keys() == {
    'a.parquet: group 2, row 1',
    'a.parquet: group 2, row 2',
    'a.parquet: group 3, row 0',
    'a.parquet: group 3, row 1',
    'c.parquet',
  }
  assert 'the medium is NoneType' in faults['a.parquet: group 2, row 2']
  wrong = ParquetFiles(str(tmp_path / 'a.parquet'), medium='picture')
  with pytest.raises(ConfigError, match='no column picture; there are image, caption'):
    wrong.open(tmp_path / 'cache')
