"""Rebuilds the captioned drawings that ship in the package from a public Debian package.

  python scripts/build_images.py                 download, draw, write deepseek_jax/data/images/
  python scripts/build_images.py --check         draw again and compare with what is there
  python scripts/build_images.py --inputs=DIR    use (and keep) the package in DIR

Needs `apt-get` and `dpkg-deb` on PATH, on Debian 12, and `pip install cairosvg` with the library
libcairo. Names, captions and the package are pinned by SHA-256. Pixels depend on the versions of
cairo and libwebp: `--check` compares them after decoding, to within a few grey levels.
"""

import hashlib
import json
import lzma
import multiprocessing
import pathlib
import subprocess
import tempfile
import zlib
from collections import Counter
from typing import Any

import numpy as np
from absl import app, flags

from scripts import drawings

_INPUTS = flags.DEFINE_string('inputs', None, 'Folder of the downloaded package; kept if given.')
_OUTPUT = flags.DEFINE_string(
  'output',
  str(pathlib.Path(__file__).parents[1] / 'deepseek_jax' / 'data' / 'images'),
  'Folder the drawings are written to.',
)
_CHECK = flags.DEFINE_bool('check', False, 'Compare with the files there; write nothing.')

_PACKAGE = 'openclipart-svg_1%3a0.18+dfsg-19_all.deb'
_PACKAGE_HASH = '989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5'
# SHA-256 of the records without what depends on the picture's encoding.
_RECORDS_HASH = '39e37fea347cf6e24d20d8419326190f3e30b531c6ce81732f23936d9ba48921'

_SIDE = 64
_QUALITY = 80

# Drawings whose grey pictures agree more than this (correlation of 16 × 16 cells) are variants of
# one; of each, some are kept, and all of them are on one side of the split.
_SAME_DRAWING = 0.95
_VARIANTS = 8
_HELDOUT_EVERY = 12
# A picture with less contrast than this, in grey levels, shows nothing on white.
_LEAST_CONTRAST = 3.0

# Mean difference of grey levels between a picture there and one rebuilt that `--check` lets pass.
_TOLERANCE = 6.0


def _download(folder: pathlib.Path) -> None:
  """Fetches the package if it is not in `folder` yet, and checks it."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / _PACKAGE
  if not path.exists():
    name, version, _ = _PACKAGE.replace('%3a', ':').split('_')
    subprocess.run(['apt-get', '-q', 'download', f'{name}={version}'], cwd=folder, check=True)
  found = hashlib.sha256(path.read_bytes()).hexdigest()
  if found != _PACKAGE_HASH:
    raise SystemExit(f'{_PACKAGE}: SHA-256 is {found}, expected {_PACKAGE_HASH}')


def _draw_all(folder: pathlib.Path) -> tuple[list[drawings.Drawing], np.ndarray]:
  """Every drawing that can be drawn, shows something and has a keyword; says what is left out."""
  root = folder / 'usr' / 'share' / 'openclipart' / 'svg'
  paths = sorted(path for path in root.rglob('*.svg') if not path.is_symlink())
  names = [path.relative_to(root).as_posix() for path in paths]
  with multiprocessing.Pool() as pool:
    jobs = [(str(path), name, _SIDE) for path, name in zip(paths, names)]
    results = pool.starmap(drawings.read, jobs, chunksize=8)
  left_out: Counter[str] = Counter()
  kept, pictures = [], []
  for drawing, picture, fault in results:
    if not fault and picture.std() < _LEAST_CONTRAST:
      fault = 'blank on white'
    if not fault and not drawing.keywords:
      fault = 'no keyword'
    if fault:
      left_out[fault] += 1
    else:
      kept.append(drawing)
      pictures.append(picture)
  print(f'{len(names):,} drawings, {len(kept):,} usable; left out: {dict(left_out)}')
  return kept, np.stack(pictures)


def _records(folder: pathlib.Path) -> tuple[list[dict[str, Any]], np.ndarray]:
  """One record a kept drawing, in order of paths, and the pictures [n, S, S, 3] uint8."""
  kept, pictures = _draw_all(folder)
  groups = drawings.variants(pictures, [drawing.family for drawing in kept], _SAME_DRAWING)
  captions = drawings.captions(kept)
  chosen = []
  for members in groups:
    # By hash, so that the kept ones are spread over a long series.
    ranked = sorted(members, key=lambda i: hashlib.sha256(kept[i].name.encode()).digest())
    chosen += [(i, kept[members[0]].name) for i in ranked[:_VARIANTS]]
  chosen.sort()
  records = []
  for index, group in chosen:
    place = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], 'big')
    keywords, caption = captions[index]
    records.append(
      {
        'name': kept[index].name,
        'drawing': group,
        'split': 'heldout' if place % _HELDOUT_EVERY == 0 else 'train',
        'keywords': keywords,
        'caption': caption,
        'svg': kept[index].digest,
      }
    )
  print(f'{len(groups):,} drawings after joining variants; {len(records):,} pictures kept')
  return records, pictures[[index for index, _ in chosen]]


def _lines(records: list[dict[str, Any]]) -> bytes:
  return ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in records).encode('utf-8')


def _compare(records: list[dict[str, Any]], pictures: np.ndarray, output: pathlib.Path) -> list:
  """Returns what differs from the files in `output`."""
  from deepseek_jax.data.drawing import read_pictures, read_records

  there = read_records(output)
  bare = [{key: record[key] for key in records[0]} for record in there]
  wrong = []
  if bare != records:
    wrong.append('openclipart.jsonl.xz: differs from the rebuilt records')
    names = {record['name']: place for place, record in enumerate(records)}
    print(f'{len(names.keys() ^ {r["name"] for r in bare})} drawings are in one of the two only')
    return wrong
  decoded = read_pictures(output, there).astype(np.float32)
  difference = np.abs(decoded - pictures).mean(axis=(1, 2, 3))
  print(f'pictures differ by {difference.mean():.2f} grey levels, at most {difference.max():.2f}')
  for place in np.flatnonzero(difference > _TOLERANCE):
    wrong.append(f'{records[place]["name"]}: differs by {difference[place]:.1f} grey levels')
  return wrong


def _write(records: list[dict[str, Any]], pictures: np.ndarray, output: pathlib.Path) -> None:
  """Writes the container and its index."""
  output.mkdir(parents=True, exist_ok=True)
  blobs = [drawings.encode(picture, _QUALITY) for picture in pictures]
  whole = [
    {**record, 'bytes': len(blob), 'crc32': zlib.crc32(blob)}
    for record, blob in zip(records, blobs)
  ]
  (output / 'openclipart.webp.bin').write_bytes(b''.join(blobs))
  packed = lzma.compress(
    _lines(whole),
    format=lzma.FORMAT_XZ,
    check=lzma.CHECK_CRC64,
    preset=9 | lzma.PRESET_EXTREME,
  )
  (output / 'openclipart.jsonl.xz').write_bytes(packed)


def _summary(records: list[dict[str, Any]], output: pathlib.Path) -> None:
  for split in ('train', 'heldout'):
    part = [record for record in records if record['split'] == split]
    count = len({record['drawing'] for record in part})
    size = sum(len(record['caption'].encode('utf-8')) for record in part)
    print(f'{split:8} {len(part):6,} pictures of {count:6,} drawings {size:9,} bytes of captions')
  for name in ('openclipart.webp.bin', 'openclipart.jsonl.xz'):
    content = (output / name).read_bytes()
    print(f'{name:22} {len(content):10,} bytes   {hashlib.sha256(content).hexdigest()}')


def main(argv: list[str]) -> None:
  """Builds or checks the drawings."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  output = pathlib.Path(_OUTPUT.value)
  with tempfile.TemporaryDirectory() as scratch:
    inputs = pathlib.Path(_INPUTS.value or scratch)
    _download(inputs)
    unpacked = pathlib.Path(scratch, 'unpacked')
    subprocess.run(['dpkg-deb', '-x', inputs / _PACKAGE, unpacked], check=True)
    records, pictures = _records(unpacked)
  wrong = []
  if _CHECK.value:
    wrong = _compare(records, pictures, output)
  else:
    _write(records, pictures, output)
  found = hashlib.sha256(_lines(records)).hexdigest()
  if found != _RECORDS_HASH:
    wrong.append(f'SHA-256 of the records is {found}, expected {_RECORDS_HASH}')
  _summary(records, output)
  if wrong:
    raise SystemExit('\n'.join(wrong))


if __name__ == '__main__':
  app.run(main)
