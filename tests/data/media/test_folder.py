"""Captions beside media and in tables: a medium whose caption is not certain is left out."""

import io
import json
import unicodedata

from PIL import Image

from deepseek_jax.data.media.decode import Sizes
from deepseek_jax.data.media.folder import MediaFolder


def picture(shade: int) -> bytes:
  """A grey picture."""
  stream = io.BytesIO()
  Image.new('RGB', (8, 8), (shade, shade, shade)).save(stream, 'PNG')
  return stream.getvalue()


GOOD = {'a.png', 'b.png', 'c.png', 'd.png', 'e.png', 'sub/a.png', 'é.png', 'same.png', 'bom.png'}
BROKEN = {
  'none.png': 'no caption',
  'blank.png': 'the caption is empty',
  'empty.png': 'the caption is empty',
  'latin.png': 'not UTF-8',
  'long.png': 'has 300 letters, more than 200',
  'number.png': 'the caption is int, not text',
  'list.png': 'found list, expected an object',
  'fields.png': 'no field caption or text',
  'notjson.png': 'not JSON',
  'both.png': 'different captions in both.txt and both.json',
  'twin.png': 'twin.txt could be the caption of 2 files',
  'twin.jpg': 'twin.txt could be the caption of 2 files',
  'table.png': "two captions: 'one' and 'other'",
  'bytes.png': 'not UTF-8',
  'void.png': 'the caption is empty',
}


def write_files(tmp_path) -> None:
  """Pictures, and captions of all sorts."""
  for name in GOOD | set(BROKEN):
    path = tmp_path / unicodedata.normalize('NFD', name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(picture(3))
  write = lambda name, text: (tmp_path / name).write_text(text, encoding='utf-8')  # noqa: E731
  write('a.txt', ' this is a.png\n')
  write('sub/a.txt', 'this is sub/a.png')
  write('b.json', '{"caption": "this is b.png", "more": 1}')
  write('bom.txt', '\ufeffthis is bom.png')
  write('same.txt', 'this is same.png')
  write('same.json', '{"text": "this is same.png"}')
  lines = [
    {'file': 'c.png', 'caption': 'this is c.png'},
    {'file_name': 'é.png', 'text': 'this is é.png'},
  ]
  lines += [{'file': 'table.png', 'caption': 'one'}, {'file': 'table.png', 'caption': 'other'}]
  lines += [{'file': 'gone.png', 'caption': 'x'}, {'file': '../x.png', 'caption': 'x'}]
  lines += [{'caption': 'x'}, ['x'], {'file': 'void.png', 'caption': None, 'text': ' '}]
  text = '\n'.join(json.dumps(line, ensure_ascii=False) for line in lines)
  write('captions.jsonl', f'{text}\n{{"file": "d.png", \n\n')
  table = b'file,caption\nd.png,"this is d.png"\n' + b'bytes.png,caf\xe9\n'
  (tmp_path / 'more.csv').write_bytes(table + b'"e.png","this is e.png"\n')
  for name, caption in {
    'blank': ' \n ',
    'empty': '',
    'long': 'x' * 300,
    'twin': 'x',
    'both': 'x',
  }.items():
    write(f'{name}.txt', caption)
  (tmp_path / 'latin.txt').write_bytes('café'.encode('latin-1'))
  for name, body in {'number': '{"caption": 3}', 'list': '[1]', 'fields': '{}'}.items():
    write(f'{name}.json', body)
  write('notjson.json', '{')
  write('both.json', '{"caption": "y"}')
  write('notes.md', 'x')
  write('.hidden', 'x')


def test_captions(tmp_path):
  """No caption goes to another medium; what is left out is listed with its reason."""
  write_files(tmp_path)
  source = MediaFolder(str(tmp_path), sizes=Sizes(side=8), heldout_fraction=0.5, longest=200)
  # One picture in all files is one content: nothing could be held out.
  (tmp_path / 'a.png').write_bytes(picture(99))
  records = source.open(tmp_path / '.cache')
  found = {}
  for split in ('train', 'heldout'):
    for record in records.walk(split):
      found[unicodedata.normalize('NFC', record.name)] = record.learnt
  assert found == {name: f'this is {name}' for name in GOOD}
  reasons = {unicodedata.normalize('NFC', f.name): f.reason for f in records.faults}
  for name, reason in BROKEN.items():
    assert reason in reasons.pop(name)
  assert reasons == {
    'gone.png': 'has a caption, but there is no such file',
    'captions.jsonl line 6': "'../x.png' is outside the folder",
    'captions.jsonl line 7': 'names no file',
    'captions.jsonl line 8': 'names no file',
    'captions.jsonl line 10': reasons['captions.jsonl line 10'],
    'notes.md': 'of no known kind',
  }
