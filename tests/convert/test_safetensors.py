"""Files of tensors: what is written is read, byte by byte; what is broken is named."""

import json

import ml_dtypes
import numpy as np
import pytest

from deepseek_jax.convert import safetensors
from deepseek_jax.convert.lazy import stored, transposed
from deepseek_jax.core.config import ConfigError

RNG = np.random.default_rng(0)
TENSORS = {
  'embed.weight': RNG.standard_normal((7, 5)).astype(np.float32),
  'half': RNG.standard_normal((3, 4, 2)).astype(ml_dtypes.bfloat16),
  'eight': RNG.standard_normal((4, 8)).astype(ml_dtypes.float8_e4m3fn),
  'scale': np.float32([[0.5, 2.0]]).astype(ml_dtypes.float8_e8m0fnu),
  'packed': RNG.integers(-128, 128, (2, 6)).astype(np.int8),
  'table': RNG.integers(0, 9, (5, 2)),
  'one': np.float64(3.5)[None][0:1].reshape(()),
  'nobody': np.zeros((0, 4), np.float16),
}


def lazy(tensors=None):
  return {name: stored(array) for name, array in (tensors or TENSORS).items()}


def same(found, tensors=None):
  """Every tensor, bit by bit."""
  tensors = tensors or TENSORS
  assert list(found) == list(tensors)
  for name, array in tensors.items():
    assert found[name].shape == array.shape
    assert found[name].dtype == array.dtype
    assert found[name].whole().tobytes() == array.tobytes()


def test_a_file(tmp_path):
  path = tmp_path / 'model.safetensors'
  assert list(safetensors.write_file(path, lazy())) == list(TENSORS)
  same(safetensors.open_file(path))
  assert list(tmp_path.iterdir()) == [path]
  assert (8 + int.from_bytes(path.read_bytes()[:8], 'little')) % 8 == 0


@pytest.mark.parametrize(('largest', 'files'), [(10**9, 1), (150, 3), (1, 8)])
def test_a_folder(tmp_path, largest, files, monkeypatch):
  """In one file, or in several with an index; in small pieces."""
  monkeypatch.setattr(safetensors, 'PIECE', 20)
  folder = tmp_path / 'new' / 'folder'
  assert list(safetensors.write_folder(folder, lazy(), largest)) == list(TENSORS)
  assert len(list(folder.glob('*.safetensors'))) == files
  assert (folder / safetensors.INDEX).is_file() == (files > 1)
  same(safetensors.open_folder(folder))
  if files > 1:
    index = json.loads((folder / safetensors.INDEX).read_text())
    assert index['metadata']['total_size'] == sum(a.nbytes for a in TENSORS.values())
    # Without the index the names of the files say the order.
    (folder / safetensors.INDEX).unlink()
    same(safetensors.open_folder(folder))


def test_what_is_not_in_memory(tmp_path):
  """A transposed tensor is written as it would lie."""
  array = TENSORS['embed.weight']
  list(safetensors.write_folder(tmp_path, {'x': transposed(stored(array))}))
  found = safetensors.open_folder(tmp_path)['x']
  np.testing.assert_array_equal(found.whole(), array.T)
  np.testing.assert_array_equal(found[1:3, 2:6], array.T[1:3, 2:6])


def test_a_failure_leaves_nothing(tmp_path):
  """Neither half a file nor an index."""
  path = tmp_path / 'model.safetensors'
  list(safetensors.write_file(path, lazy()))
  before = path.read_bytes()

  def fail(index):
    raise OSError('disk')

  broken = {**lazy(), 'bad': safetensors.Lazy((3,), np.dtype(np.float32), fail)}
  with pytest.raises(OSError, match='disk'):
    list(safetensors.write_file(path, broken))
  assert list(tmp_path.iterdir()) == [path]
  assert path.read_bytes() == before


def broken(kind, folder):
  """Damages a good folder of two files."""
  list(safetensors.write_folder(folder, lazy(), 150))
  first = sorted(folder.glob('*.safetensors'))[0]
  data = first.read_bytes()
  index = folder / safetensors.INDEX
  if kind == 'cut':
    first.write_bytes(data[:-4])
  elif kind == 'pointer':
    first.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
  elif kind == 'empty':
    first.write_bytes(b'')
  elif kind == 'text':
    first.write_bytes((16).to_bytes(8, 'little') + b'{"a": nonsense }' + b'0' * 64)
  elif kind == 'list':
    first.write_bytes((8).to_bytes(8, 'little') + b'[]      ')
  elif kind == 'dtype':
    first.write_bytes(data.replace(b'"F32"', b'"F99"'))
  elif kind == 'shape':
    first.write_bytes(data.replace(b'"shape":[7,5]', b'"shape":[7,6]'))
  elif kind == 'gone':
    first.unlink()
  elif kind == 'renamed':
    first.write_bytes(data.replace(b'embed.weight', b'embed.wEight'))
  elif kind == 'index':
    index.write_text('{"weights": {}}')
  elif kind == 'twice':
    index.unlink()
    (folder / 'copy.safetensors').write_bytes(data)


@pytest.mark.parametrize(
  ('kind', 'message'),
  [
    ('cut', r'00001-of-00003.*embed.weight ends at byte .*: it is cut off'),
    ('pointer', 'header would have .* Git LFS'),
    ('empty', r'the file has 0; expected a safetensors file'),
    ('text', 'its header is no JSON'),
    ('list', 'its header is list; expected an object'),
    ('dtype', r"embed.weight: its entry .*'F99'.* is not one of a tensor"),
    ('shape', r'embed.weight: 140 bytes for F32 \[7, 6\]'),
    ('gone', 'model-00001-of-00003.safetensors of .*index.json is not there'),
    ('renamed', r'1 of 8 tensors of .* are not in their files, the first embed.weight in model-0'),
    ('index', 'expected an object with a `weight_map`'),
    ('twice', 'embed.weight is in another file too, and there is no'),
  ],
)
def test_what_is_broken(tmp_path, kind, message):
  broken(kind, tmp_path)
  with pytest.raises(ConfigError, match=message):
    safetensors.open_folder(tmp_path)


def test_no_files(tmp_path):
  with pytest.raises(ConfigError, match=r'holds no \*.safetensors'):
    safetensors.open_folder(tmp_path)
  with pytest.raises(ConfigError, match='No such file'):
    safetensors.open_file(tmp_path / 'model.safetensors')
