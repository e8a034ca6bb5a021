"""A question's file: what it gives, and every way in which it is none."""

import pathlib

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.serialise import from_json, to_json
from deepseek_jax.lab.match import FlopsPerToken
from deepseek_jax.lab.question import read_question

ROOT = pathlib.Path(__file__).resolve().parents[2]
TWO = 'def variants():\n  return chain({}, deep={"model.depth": 3, "model.dense_layers": 3})\n'


def test_a_question_is_its_variants_seeds_match_and_baseline(write_question):
  file = write_question(
    'def variants():\n  return product({"optimizer.peak_lr": [0.1, 0.2]}, seeds(3))\n'
    'match = FlopsPerToken()\nbaseline = "peak_lr=0.2"\n'
  )
  question = read_question(file, ROOT)
  assert question.name == 'question'
  assert [v.name for v in question.variants] == ['peak_lr=0.1', 'peak_lr=0.2']
  assert [v.config.optimizer.peak_lr for v in question.variants] == [0.1, 0.2]
  assert (question.seeds, question.match) == ((0, 1, 2), FlopsPerToken())
  assert question.baseline == 'peak_lr=0.2'


def test_what_is_absent_and_what_the_command_line_says(write_question):
  question = read_question(write_question(TWO), ROOT)
  assert (question.seeds, question.match, question.baseline) == ((0,), None, 'base')
  question = read_question(write_question(TWO), ROOT, seeds=2, steps=7)
  assert question.seeds == (0, 1)
  assert {variant.config.train_steps for variant in question.variants} == {7}


def test_kinds_of_a_question_are_found_again(write_question, tmp_path):
  """A file below the root is known by its dotted name, in saved configs too."""
  file = write_question(
    'import dataclasses\nfrom deepseek_jax.optim.optimizer import AdamW\n'
    '@dataclasses.dataclass(frozen=True, kw_only=True)\nclass Mine(AdamW):\n  extra: int = 3\n'
    'def variants():\n  return chain({}, mine={"optimizer": Mine(peak_lr=0.1)})\n',
    name='asked',
  )
  question = read_question(file, tmp_path)
  data = to_json(question.variants[1].config)
  assert data['optimizer']['kind'] == 'asked.sweep:Mine'
  assert from_json(data) == question.variants[1].config


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('', 'no function `variants`'),
    ('def variant():\n  return chain({})\n', 'did you mean `variant`'),
    ('def variants():\n  return [{}]\n', 'returns list; expected a Sweep'),
    ('def variants():\n  return 1 / 0\n', 'ZeroDivisionError'),
    ('def variants():\n  return product({"model.depth": 3})\n', 'expected a list of values'),
    (TWO + 'baseline = "depe"\n', 'none of .base, deep.; did you mean `deep`'),
    (TWO + 'match = FlopsPerToken\n', 'expected one of .ActiveParameters'),
    (TWO + 'match = "WallClock"\n', 'expected one of .ActiveParameters'),
    ('def variants():\n  return chain(logs={})\n', 'cannot be called logs'),
    ('def variants():\n  return chain(a={}).where(lambda p: 0)\n', 'no variant'),
    ('def variants():\n  return chain({"seed": 3})\n', r'use seeds\(n\)'),
    (TWO + 'def base():\n  return 3\n', 'returns int; expected an Experiment'),
    ('import nothing_such\n', 'nothing_such'),
  ],
)
def test_what_is_no_question_is_refused(text, message, write_question):
  with pytest.raises(ConfigError, match=message):
    read_question(write_question(text), ROOT)


def test_steps_are_given_once(write_question):
  file = write_question('def variants():\n  return product({"train_steps": [5, 6]})\n')
  assert len(read_question(file, ROOT).variants) == 2
  with pytest.raises(ConfigError, match='leave one of the two out'):
    read_question(file, ROOT, steps=3)


def test_no_file_is_no_question(tmp_path):
  with pytest.raises(ConfigError, match='there is no file'):
    read_question(tmp_path / 'none.py', ROOT)
