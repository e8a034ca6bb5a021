"""Plans: everything is checked before anything runs, and what was measured stays."""

import dataclasses
import pathlib

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.lab import planning
from deepseek_jax.lab.match import WallClock
from deepseek_jax.lab.planning import make_plan, measures
from deepseek_jax.lab.question import read_question

ROOT = pathlib.Path(__file__).resolve().parents[2]
TWO = 'def variants():\n  return chain({}, deep={"model.depth": 3, "model.dense_layers": 3})\n'


def test_every_fault_of_every_variant_comes_at_once(write_question, tmp_path):
  file = write_question(
    'def variants():\n  return product({"model.vocab": [264, 64]}, '
    'chain({}, late={"schedule.warmup_steps": 99}), chain(a={}, b={"data.batch_size": 7}))\n'
  )
  with pytest.raises(ConfigError) as caught:
    make_plan(read_question(file, ROOT), tmp_path)
  text = str(caught.value)
  assert len(caught.value.messages) == 3
  assert 'vocab=64,a, vocab=64,b, vocab=64,late,a, vocab=64,late,b: model.vocab is 64' in text
  assert 'warmup_steps=99' in text
  assert 'data.batch_size 7 gives 7 rows' in text


def test_steps_are_matched_and_checked_again(write_question, tmp_path):
  match = '\nmatch = FlopsPerToken()\n'
  plan = make_plan(read_question(write_question(TWO + match), ROOT), tmp_path)
  base, deep = plan.variants
  assert (base.matched.steps, base.experiment.train_steps) == (20, 20)
  assert deep.matched.steps == deep.experiment.train_steps < 20
  assert plan.match == 'FlopsPerToken()'
  # A variant of four times the text has steps for no such warm-up.
  long = 'def variants():\n  warm = {"schedule.warmup_steps": 15}\n'
  long += '  return chain(base=warm, long=warm | {"data.length": 64})\n'
  with pytest.raises(ConfigError, match=r'^long: .*warmup_steps=15'):
    make_plan(read_question(write_question(long + match), ROOT), tmp_path)


def test_what_was_timed_is_kept(write_question, tmp_path, monkeypatch):
  costs = iter([{'base': 1.0, 'deep': 2.0}, {'base': 3.0, 'wide': 12.0}])
  monkeypatch.setattr(WallClock, 'measure', lambda *_: next(costs))
  text = TWO + 'match = WallClock()\n'
  question = read_question(write_question(text), ROOT)
  assert measures(question)
  first = make_plan(question, tmp_path)
  assert [variant.matched.steps for variant in first.variants] == [20, 10]
  assert make_plan(question, tmp_path, first) == first
  # A variant that comes later is timed beside the baseline; the others keep their steps.
  more = text.replace('deep=', 'wide={"model.width": 32}, deep=')
  second = make_plan(read_question(write_question(more), ROOT), tmp_path, first)
  steps = {variant.name: variant.matched.steps for variant in second.variants}
  assert steps == {'base': 20, 'wide': 5, 'deep': 10}


def test_the_fastest_precision_is_measured_once_for_all(write_question, tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(planning, 'fastest_precision', lambda: (calls.append(1), ('bfloat16', {}))[1])
  text = 'from deepseek_jax.core.precision import Fastest, Float32\n'
  text += 'def variants():\n  return chain(fast={"precision": Fastest()}, plain={})\n'
  question = read_question(write_question(text), ROOT)
  plan = make_plan(question, tmp_path)
  assert plan.precision == 'BFloat16'
  kinds = [type(variant.experiment.precision).__name__ for variant in plan.variants]
  assert kinds == ['BFloat16', 'Float32']
  assert make_plan(question, tmp_path, plan) == plan
  assert len(calls) == 1
  monkeypatch.setattr(planning, 'fastest_precision', lambda: ('float32', {}))
  with pytest.raises(ConfigError, match='variants fast and plain are the same config'):
    make_plan(question, tmp_path)


def test_more_seeds_and_variants_are_welcome(write_question, tmp_path, monkeypatch):
  question = read_question(write_question(TWO), ROOT, seeds=2)
  first = make_plan(question, tmp_path)
  built = []
  real = planning.build_program
  monkeypatch.setattr(planning, 'build_program', lambda e: (built.append(e), real(e))[1])
  more = TWO.replace('deep=', 'wide={"model.width": 32}, deep=')
  second = make_plan(read_question(write_question(more), ROOT, seeds=1), tmp_path, first)
  assert second.seeds == (0, 1)
  assert [variant.name for variant in second.variants] == ['base', 'wide', 'deep']
  assert [experiment.model.width for experiment in built] == [32]
  assert dataclasses.replace(second, variants=first.variants) == first
