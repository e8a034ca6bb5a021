"""The embedded corpus is what it should be; the reader's files are split by document."""

import collections

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.source import EMBEDDED_SOURCES, Embedded, TextFiles
from deepseek_jax.data.split import SPLITS
from deepseek_jax.data.tokenizer import CORPUS_FOLDER


@pytest.fixture(scope='module')
def embedded():
  """Both splits of the whole corpus."""
  return {split: list(Embedded().documents(split)) for split in SPLITS}


def test_embedded_sizes(embedded):
  """Twenty megabytes, half a megabyte of them held out, in five megabytes of files."""
  sizes = {s: sum(len(d.text.encode()) for d in embedded[s]) for s in SPLITS}
  assert sizes == {'train': 19_765_410, 'heldout': 469_922}
  assert sum(path.stat().st_size for path in CORPUS_FOLDER.glob('*.xz')) < 5_500_000


def test_embedded_sources_are_in_both_splits(embedded):
  """In the proportions that PROVENANCE.md states."""
  counts = {s: collections.Counter(d.source for d in embedded[s]) for s in SPLITS}
  assert counts['train'] == {'sotu': 227, 'austen': 262, 'moby_dick': 135, 'kjv': 1159}
  assert counts['heldout'] == {'sotu': 6, 'austen': 7, 'moby_dick': 3, 'kjv': 30}


def test_embedded_splits_share_no_document(embedded):
  """Neither by title nor by text."""
  for field in ('title', 'text'):
    train, heldout = ({getattr(d, field) for d in embedded[s]} for s in SPLITS)
    assert not train & heldout
    assert len(heldout) == len(embedded['heldout'])


def test_embedded_text_is_clean(embedded):
  """No control characters, one newline at the end; known words where they should be."""
  for documents in embedded.values():
    for document in documents:
      assert document.text.strip()
      assert document.text.endswith('\n')
      assert '\n\n\n' not in document.text
      assert not any(ord(c) < 32 and c != '\n' for c in document.text)
  titles = {d.title: d.text for d in embedded['train']}
  assert 'In the beginning God created the heaven' in titles['Genesis 1']
  assert 'Call me Ishmael.' in titles['Moby Dick, chapter 1']
  assert 'It is a truth universally acknowledged' in titles['Pride and Prejudice, chapter 1']


def test_embedded_can_be_restricted():
  """The order given is the order read, and decides the fingerprint."""
  chosen = Embedded(sources=('kjv', 'moby_dick'))
  assert list(dict.fromkeys(d.source for d in chosen.documents('heldout'))) == ['kjv', 'moby_dick']
  others = (Embedded(), Embedded(sources=('moby_dick', 'kjv')), Embedded(sources=('kjv',)))
  assert chosen.fingerprint() not in {other.fingerprint() for other in others}


@pytest.mark.parametrize('sources', [(), ('moby',), ('kjv', 'kjv')])
def test_embedded_refuses(sources):
  """And says what there is."""
  with pytest.raises(ConfigError, match=', '.join(EMBEDDED_SOURCES)):
    Embedded(sources=sources)


def write(folder, count):
  """Writes one short text a file."""
  folder.mkdir(exist_ok=True)
  for i in range(count):
    (folder / f'{i:03}.txt').write_text(f'document {i}\n', encoding='utf-8')
  return str(folder / '*.txt')


def texts(source, split):
  """The texts of a split."""
  return [document.text for document in source.documents(split)]


def test_files_are_split_by_content(tmp_path):
  """Every document on one side, the share about right; the names do not matter."""
  pattern = write(tmp_path / 'a', 400)
  source = TextFiles(pattern, heldout_fraction=0.1)
  train, heldout = texts(source, 'train'), texts(source, 'heldout')
  assert sorted(train + heldout) == sorted(f'document {i}\n' for i in range(400))
  assert 20 <= len(heldout) <= 60
  moved = tmp_path / 'b'
  moved.mkdir()
  for i, path in enumerate(sorted((tmp_path / 'a').iterdir())):
    (moved / f'{999 - i}.txt').write_bytes(path.read_bytes())
  assert set(texts(TextFiles(str(moved / '*.txt'), heldout_fraction=0.1), 'heldout')) == set(
    heldout
  )


def test_added_files_move_no_other(tmp_path):
  """A text that was held out is never trained on later."""
  pattern = write(tmp_path, 200)
  before = texts(TextFiles(pattern, heldout_fraction=0.1), 'heldout')
  write(tmp_path, 300)
  after = texts(TextFiles(pattern, heldout_fraction=0.1), 'heldout')
  assert len(before) < len(after)
  assert set(before) < set(after)


@pytest.mark.parametrize('fraction', [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize('count', [2, 3, 7])
def test_few_documents_leave_no_split_empty(tmp_path, count, fraction):
  """However small or large the share."""
  source = TextFiles(write(tmp_path, count), heldout_fraction=fraction)
  train, heldout = texts(source, 'train'), texts(source, 'heldout')
  assert train
  assert heldout
  assert len(train) + len(heldout) == count


def test_a_single_document_is_cut_at_a_paragraph(tmp_path, capsys):
  """Nothing is lost, and it is said."""
  paragraphs = [f'Paragraph {i} is here.\nIt has two lines.\n\n' for i in range(50)]
  (tmp_path / 'one.txt').write_text(''.join(paragraphs), encoding='utf-8')
  source = TextFiles(str(tmp_path / 'one.txt'), heldout_fraction=0.1)
  (train,), (heldout,) = texts(source, 'train'), texts(source, 'heldout')
  assert train + heldout == ''.join(paragraphs)
  assert heldout.startswith('Paragraph')
  assert 0.08 < len(heldout) / len(train + heldout) < 0.14
  assert 'one document; its last part is held out' in capsys.readouterr().err


@pytest.mark.parametrize('text', ['ab', 'one two', 'x' * 1000])
def test_a_single_document_without_paragraphs(tmp_path, text):
  """Cut at a blank, or anywhere."""
  (tmp_path / 'one.txt').write_text(text, encoding='utf-8')
  source = TextFiles(str(tmp_path / 'one.txt'))
  (train,), (heldout,) = texts(source, 'train'), texts(source, 'heldout')
  assert train
  assert heldout
  assert train + heldout == text


def test_documents_that_cannot_be_split(tmp_path):
  """Copies of one text, or one character."""
  (tmp_path / 'a.txt').write_text('same')
  (tmp_path / 'b.txt').write_text('same')
  with pytest.raises(ConfigError, match='all 2 documents are the same text'):
    list(TextFiles(str(tmp_path / '*.txt')).documents('train'))
  (tmp_path / 'c.txt').write_text('x')
  with pytest.raises(ConfigError, match='cannot be split'):
    list(TextFiles(str(tmp_path / 'c.txt')).documents('train'))


def test_fingerprint_follows_the_content(tmp_path):
  """Same size and name, another letter."""
  pattern = write(tmp_path, 3)
  before = TextFiles(pattern).fingerprint()
  assert TextFiles(pattern).fingerprint() == before
  assert TextFiles(pattern, heldout_fraction=0.3).fingerprint() != before
  (tmp_path / '001.txt').write_text('documenT 1\n')
  assert TextFiles(pattern).fingerprint() != before


def test_changed_files_are_split_anew(tmp_path):
  """The remembered threshold belongs to the old content."""
  pattern = write(tmp_path, 1)
  assert len(texts(TextFiles(pattern), 'train')) == 1
  write(tmp_path, 40)
  source = TextFiles(pattern)
  assert len(texts(source, 'train')) + len(texts(source, 'heldout')) == 40


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'pattern': ''}, 'pattern'),
    ({'pattern': 'a', 'heldout_fraction': 0.0}, 'heldout_fraction'),
    ({'pattern': 'a', 'heldout_fraction': 1.0}, 'heldout_fraction'),
    ({'pattern': 'a', 'field': ''}, 'field'),
  ],
)
def test_refuses(arguments, message):
  """What no source can be made of."""
  with pytest.raises(ConfigError, match=message):
    TextFiles(**arguments)
