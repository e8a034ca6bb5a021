"""The report: one whole page from any state of a run's folder."""

import base64
import html.parser
import json
import re

import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.train.history import read_history
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.report_page import report_page, write_report

VOID = {'meta', 'img', 'br', 'hr', 'link', 'input', 'path'}
SECTIONS = {
  'curves',
  'experts',
  'samples',
  'evaluations',
  'throughput',
  'faults',
  'events',
  'config',
  'environment',
}
ATTACK = '</code></title><script>alert(1)</script><img src=x onerror="alert(2)">\x00\ud800'
PICTURE = 'data:image/png;base64,' + base64.b64encode(b'\x89PNG pixels').decode()


class Page(html.parser.HTMLParser):
  """Reads a page and fails where its tags are not balanced or it would load something."""

  def __init__(self, text: str):
    super().__init__()
    self.open: list[str] = []
    self.ids: list[str] = []
    self.tags: list[tuple[str, dict]] = []
    self.words: list[str] = []
    self.feed(text)
    self.close()
    assert self.open == [], self.open
    assert len(set(self.ids)) == len(self.ids)

  def handle_starttag(self, tag, attrs):
    attributes = dict(attrs)
    self.tags.append((tag, attributes))
    if tag not in VOID:
      self.open.append(tag)
    if 'id' in attributes:
      self.ids.append(attributes['id'])
    for name, value in attributes.items():
      assert not name.startswith('on'), (tag, name)
      if name in ('src', 'href', 'srcset', 'action', 'data', 'xlink:href'):
        assert value.startswith(('#', 'data:image/')), (tag, value)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open, tag
    assert self.open.pop() == tag

  def handle_data(self, data):
    if not self.open or self.open[-1] not in ('style', 'script'):
      self.words.append(data)

  @property
  def text(self) -> str:
    return ' '.join(' '.join(self.words).split())


def read(path, named=None) -> Page:
  """Draws the report of a folder and reads it."""
  text = write_report(path, named).read_text(encoding='utf-8')
  assert len(text) < 1_000_000
  assert not re.search(r'https?:|//[a-z]+\.|url\(|@import', text), 'the page would load something'
  body = re.sub(r'<script>.*?</script>', '', text, flags=re.DOTALL)
  assert not re.search(r'\bnan\b|\binf\b|NaN|Infinity', body)
  page = Page(text)
  assert set(page.ids) >= SECTIONS
  return page


def test_a_finished_run_is_all_there(write_run):
  path = write_run(
    'whole',
    evaluations=[
      {'step': 10, 'loss': 1.6, 'bits_per_byte': 1.5, 'targets': 99, 'all': False},
      {'step': 20, 'loss': 1.2, 'bits_per_byte': 1.0625, 'targets': 999, 'all': True},
    ],
    samples=[{'step': s, 'prompt': 'Once', 'text': f' upon {s}'} for s in (10, 20)],
    faults=[
      {'step': 7, 'kind': 'spike', 'message': 'loss 99', 'documents': [3], 'titles': ['Ruth']}
    ],
    events=[
      {'step': 0, 'event': 'started', 'time': '2026-01-01T00:00:00+00:00'},
      {'step': 5, 'event': 'resumed', 'time': '2026-01-01T00:01:00+00:00'},
      {'step': 20, 'event': 'finished', 'time': '2026-01-01T00:02:00+00:00'},
    ],
    yardsticks={'gzip -9': 2.79, 'bigram': 1.63},
    environment={'versions': {'jax': '9.9'}, 'machine': {'memory_bytes': 2**33}},
    changes={'train_steps': 20, 'optimizer.peak_lr': 0.125},
  )
  page = read(path, tiny_mla.get_config())
  for words in (
    'Finished: step 20 of 20.', '1.0625', 'gzip -9', '-0.5675', ' upon 20', 'spike', 'loss 99',
    'Ruth', 'killed', 'optimizer.peak_lr', '0.125', 'jax', '9.9', '8.00 GiB', 'Gradient norm',
    'Max violation', 'Dead experts', 'tokens per second', 'Learning rate', 'Peak memory',
  ):  # fmt: skip
    assert words in page.text, words
  assert sum(tag == 'svg' and 'role' in attrs for tag, attrs in page.tags) >= 7
  assert all(attrs.get('alt') for tag, attrs in page.tags if tag == 'img')
  assert all(a.get('aria-label') for tag, a in page.tags if tag == 'svg' and 'role' in a)
  (heat,) = [a for tag, a in page.tags if tag == 'img' and a['src'].startswith('data:image/png')]
  assert 'Load of 4 experts in 2 layers' in heat['alt']


def test_the_page_forbids_what_it_does_not_need(write_run):
  page = read(write_run('run'))
  (policy,) = [a['content'] for tag, a in page.tags if tag == 'meta' and 'http-equiv' in a]
  assert "default-src 'none'" in policy
  assert "script-src 'sha256-" in policy
  assert sum(tag == 'script' for tag, _ in page.tags) == 1


def test_what_people_wrote_is_text(write_run):
  path = write_run(
    'attack',
    changes={'name': ATTACK.replace('\x00\ud800', ''), 'prompts': ('<script>',)},
    samples=[
      {'step': 1, 'prompt': ATTACK, 'text': ATTACK, 'image': PICTURE, 'reference': ATTACK},
      {'step': 1, 'prompt': 'b', 'text': 'c', 'image': f'{PICTURE}" onload="alert(3)'},
      {'step': 1, 'prompt': 'd', 'text': 'e', 'image': 'https:' + '//example.org/x.png'},
      {'step': 1, 'prompt': 'f', 'text': 'g', 'image': 'data:image/svg+xml;base64,AAAA'},
    ],
    faults=[{'step': 1, 'kind': ATTACK, 'message': ATTACK, 'documents': [1], 'titles': [ATTACK]}],
    events=[{'step': 1, 'event': 'failed', 'time': ATTACK, 'reason': ATTACK}],
    yardsticks={ATTACK: 1.0},
    environment={ATTACK: ATTACK, 'earlier': [{ATTACK: 1}]},
  )
  row = {'step': 21, ATTACK: 1.5, 'load': {ATTACK: [0.5, 0.5]}, 'loss': 1.0}
  JsonLines(path / 'metrics.jsonl').append(row)
  page = read(path)
  assert page.text.count('alert(1)') >= 10
  assert sum(tag == 'script' for tag, _ in page.tags) == 1
  assert [a['src'] for tag, a in page.tags if tag == 'img' and 'png;base64' in a['src']].count(
    PICTURE
  ) == 1
  assert page.text.count('no data: address') == 3


@pytest.mark.parametrize('rows', [0, 1, 2, 7])
def test_unfinished_runs_have_a_report(write_run, rows):
  page = read(write_run('part', rows=rows))
  assert ('Not finished' if rows else 'Nothing is logged yet') in page.text
  assert 'none' in page.text


def test_a_killed_run_with_losses_that_are_not_finite(write_run):
  path = write_run('nan', rows=5)
  for step in range(6, 9):
    row = {'step': step, 'loss': float('nan'), 'bits_per_byte': None, 'grad_norm': float('inf')}
    JsonLines(path / 'metrics.jsonl').append(row)
  with (path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 9, "lo')
  page = read(path)
  assert '3 of 8 logged steps have no finite loss' in page.text


def test_a_run_without_any_finite_loss(write_run):
  path = write_run('never', rows=0)
  JsonLines(path / 'metrics.jsonl').append({'step': 1, 'loss': None})
  assert 'no finite value was logged' in read(path).text


def test_what_cannot_be_read_is_said(write_run):
  path = write_run('broken')
  (path / 'samples.jsonl').write_text('{"step": "x"}\n')
  (path / 'config.json').write_text('{')
  (path / 'yardsticks.json').write_text('[]')
  text = read(path).text
  assert text.count('Could not be read') == 3
  assert 'broken' in text


def test_a_stop_and_a_failure_are_told_apart(write_run):
  for kind, reason, words in (
    ('stopped', 'SIGTERM', 'Stopped by SIGTERM: step 7 of 20'),
    ('failed', 'ValueError: no', 'Failed: step 7 of 20. ValueError: no'),
  ):
    events = [{'step': 7, 'event': kind, 'time': 'now', 'reason': reason}]
    assert words in read(write_run(kind, rows=7, events=events)).text


def test_a_folder_without_a_run_is_an_error(tmp_path):
  with pytest.raises(ConfigError, match='no run here'):
    write_report(tmp_path)
  assert list(tmp_path.iterdir()) == []


def test_a_long_run_of_a_large_model_stays_small(write_run):
  """3,000 logged rows of 58 layers with 256 experts, pictures and samples."""
  path = write_run('long', rows=0)
  noise = np.random.default_rng(0)
  shares = noise.dirichlet(np.ones(256), size=58).round(5).tolist()
  load = {f'layers/{layer}': row for layer, row in enumerate(shares, 3)}
  with (path / 'metrics.jsonl').open('w') as file:
    for step in range(3000):
      row = {name: float(noise.normal()) for name in ('loss', 'grad_norm', 'tokens_per_second')}
      row |= {'bits_per_byte': 1.0, 'mfu': float(noise.uniform()), 'auxiliary_loss': 0.1}
      row |= {'load': load} if step % 100 == 0 else {}
      row |= {'max_violation': noise.uniform(size=58).tolist()}
      file.write(json.dumps({'step': step, **row}) + '\n')
  picture = 'data:image/webp;base64,' + 'A' * 4000
  for step in (1000, 3000):
    for number in range(300):
      row = {'step': step, 'prompt': '', 'text': 'a cat', 'reference': 'cat'}
      JsonLines(path / 'samples.jsonl').append({**row, 'image': picture + str(number)})
  history = read_history(path)
  assert len(history.rows) == 3000
  text = report_page(history)
  assert 100_000 < len(text) < 1_000_000
  assert 'more in samples.jsonl' in text
  assert '256 experts, sorted by load' in text
