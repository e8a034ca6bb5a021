"""Answers are exact, and the question alone does not give them away."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.media.figure import COLOURS, SHAPES
from deepseek_jax.data.media.made import NUMBERS, Made
from deepseek_jax.data.media.question import ANSWERS, Questions, blind_accuracy
from deepseek_jax.data.media.scene import PLACES

SOURCE = Questions(made=Made(train=3000, heldout=400))
RECORDS = SOURCE.open()


def answered(question: str, figures) -> set[str]:
  """All answers to a question, by looking at every figure: an oracle of its own."""
  words = question.rstrip('?').split()
  named = [f for f in figures if f.shape in words and f.colour in words]
  if question.startswith('What colour'):
    return {f.colour for f in figures if f.shape == words[-1]}
  if question.startswith('What shape'):
    return {f.shape for f in figures if f.colour == words[-2]}
  if question.startswith('How many'):
    word = words[2] if words[2] in COLOURS else words[-1]
    return {NUMBERS[sum(word in (f.colour, f.shape) for f in figures)]}
  if question.startswith('Where'):
    return {PLACES[f.cell] for f in named}
  if question.endswith('small or large?'):
    return {f.size for f in named}
  first, second = words[2:4], words[-2:]
  (a,) = [f for f in figures if [f.colour, f.shape] == first]
  (b,) = [f for f in figures if [f.colour, f.shape] == second]
  dx, dy = a.cell % 3 - b.cell % 3, a.cell // 3 - b.cell // 3
  relation = ' '.join(words[4:-3])
  true = {'left of': dx < 0, 'right of': dx > 0, 'above': dy < 0, 'below': dy > 0}
  assert dx if relation in ('left of', 'right of') else dy
  return {'yes' if true[relation] else 'no'}


def test_every_answer_is_the_only_one():
  """Against an oracle that reads the question and looks."""
  for split in ('train', 'heldout'):
    for index in range(RECORDS.count(split)):
      scene, _ = RECORDS.scene(split, index)
      assert answered(scene.question, scene.figures) == {scene.answer}, scene
      assert 4 <= len(scene.figures) <= 6
      assert len({f.cell for f in scene.figures}) == len(scene.figures)


def test_answers_can_be_seen():
  """Colour of the pixel in the middle of a figure that is asked for, in the picture itself."""
  checked = 0
  for index in range(300):
    scene, _ = RECORDS.scene('train', index)
    if scene.kind != 'colour' or 'ring' in scene.question:
      continue
    (picture,) = RECORDS.render('train', index)
    (figure,) = [f for f in scene.figures if f.shape == scene.question.split()[-1][:-1]]
    top, left = 64 * figure.row // 3, 64 * figure.column // 3
    cell = picture[top : top + 21, left : left + 21].astype(int)
    wanted = np.abs(cell - COLOURS[scene.answer]).sum(axis=-1) < 40
    assert wanted.sum() > 20
    checked += 1
  assert checked > 20


def test_answers_are_balanced():
  """Of every kind, and of every single question that comes often."""
  by_kind, by_question = defaultdict(Counter), defaultdict(Counter)
  for index in range(3000):
    facts = RECORDS.record('train', index).facts
    by_kind[facts['kind']][facts['answer']] += 1
    by_question[facts['question']][facts['answer']] += 1
  for kind, counts in by_kind.items():
    total, options = sum(counts.values()), len(ANSWERS[kind])
    assert 400 < total < 600
    assert set(counts) == set(ANSWERS[kind])
    # Five standard deviations.
    slack = 5 * np.sqrt(total / options)
    assert max(abs(n - total / options) for n in counts.values()) < slack, kind
  often = [c for c in by_question.values() if sum(c.values()) > 25]
  assert len(often) > 20
  for counts in often:
    assert counts.most_common(1)[0][1] < 0.75 * sum(counts.values())


def test_who_does_not_look_is_right_by_chance():
  """The best guess from the words, learnt on the training questions."""
  blind = blind_accuracy(RECORDS)
  assert SOURCE.chance == pytest.approx(np.mean([1 / 8, 1 / 7, 1 / 5, 1 / 9, 1 / 2, 1 / 2]))
  assert blind.chance == pytest.approx(SOURCE.chance, abs=0.03)
  error = np.sqrt(blind.chance * (1 - blind.chance) / 400)
  assert abs(blind.question_only - blind.chance) < 4 * error
  assert set(blind.kinds) == set(ANSWERS)


def test_a_bias_would_be_noticed():
  """Questions of one answer: the same measure finds them out."""

  class Loaded:
    def count(self, split):
      return 300

    def record(self, split, index):
      found = RECORDS.record('train', index)
      found.facts['answer'] = found.facts['answers'][0]
      return found

  assert blind_accuracy(Loaded()).question_only == 1.0


def test_parts():
  record = RECORDS.record('heldout', 3)
  assert record.media == ('image',)
  assert record.given == record.facts['question']
  assert record.learnt == f' {record.facts["answer"]}'
  assert len(SHAPES) == len(ANSWERS['shape'])


def test_wrong_fields():
  with pytest.raises(ConfigError, match='did you mean `colour`'):
    Questions(about=('color',))
  with pytest.raises(ConfigError, match='each once'):
    Questions(about=('size', 'size'))
  with pytest.raises(ConfigError, match='`least` and `most` are 2 and 6'):
    Questions(least=2)
