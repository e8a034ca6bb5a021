"""Run folders read into results: figures, curves, and what became of each run."""

import json
import math
import pathlib

import pytest

import deepseek_jax
from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override
from deepseek_jax.core.serialise import digest
from deepseek_jax.lab.match import Matched
from deepseek_jax.lab.results import collect, read_results, write_results
from deepseek_jax.lab.sweep_file import Plan, Planned, write_plan
from deepseek_jax.train.metrics import JsonLines

STEPS = 40


def planned(name: str, **changes) -> Planned:
  base = {'train_steps': STEPS, 'model.mtp': None}
  experiment = override(tiny_mla.get_config(), {**base, **changes})[0]
  return Planned(
    name=name,
    changes=tuple(f'{path}: → {value}' for path, value in changes.items()),
    values={path: repr(value) for path, value in changes.items()},
    asked=digest(experiment),
    matched=Matched(cost=1.0, asked_steps=50, steps=STEPS) if name == 'wide' else None,
    experiment=experiment,
  )


def write_trial(
  folder: pathlib.Path, event: str | None, rows: int = STEPS, final: float = 2.0, reason=None
) -> None:
  """Writes the logs of a run that never ran: its loss falls from 5 to `final`."""
  folder.mkdir(parents=True)
  for step in range(1, rows + 1):
    loss = 5 + (final - 5) * step / STEPS
    row = {'step': step, 'loss': loss, 'max_violation': [0.1, 0.2 + step / 100]}
    JsonLines(folder / 'metrics.jsonl').append(row)
  if event == 'finished':
    row = {'step': STEPS, 'loss': final, 'bits_per_byte': final / 2}
    JsonLines(folder / 'evaluations.jsonl').append(row)
  if event is not None:
    found = {'step': rows, 'event': event, 'time': 0.0}
    found |= {} if reason is None else {'reason': reason}
    JsonLines(folder / 'events.jsonl').append(found)


@pytest.fixture
def sweep(tmp_path) -> pathlib.Path:
  plan = Plan(
    question='a_question',
    baseline='plain',
    match='FlopsPerToken()',
    seeds=(0, 1, 2),
    precision=None,
    platform='cpu',
    variants=(planned('plain'), planned('wide', **{'model.width': 64}), planned('torn')),
  )
  write_plan(tmp_path, plan)
  for seed in (0, 1, 2):
    write_trial(tmp_path / 'plain' / f'seed_{seed}', 'finished', final=2 + seed / 10)
  write_trial(tmp_path / 'wide/seed_0', 'finished', final=1.5)
  write_trial(tmp_path / 'wide/seed_1', None, rows=7)
  write_trial(tmp_path / 'torn/seed_0', 'failed', 9, reason='SkippedStepsError: 20 in a row')
  write_trial(tmp_path / 'torn/seed_1', 'failed', 9, reason='OSError: no room')
  write_trial(tmp_path / 'torn/seed_2', 'finished', final=math.nan)
  return tmp_path


def test_figures_and_states_of_the_runs(sweep):
  results = collect(sweep)
  assert (results.figure, results.baseline) == ('bits_per_byte', 'plain')
  plain, wide, torn = results.variants.values()
  assert plain.finished('bits_per_byte') == pytest.approx({0: 1.0, 1: 1.05, 2: 1.1})
  # The mean of the last two of forty rows, highest layer.
  figure = plain.finished('max_violation')[0]
  assert figure == pytest.approx((0.6 + 0.59) / 2)
  assert [run.status for run in wide.runs.values()] == ['finished', 'unfinished', 'unfinished']
  assert [run.status for run in torn.runs.values()] == ['diverged', 'failed', 'diverged']
  assert torn.runs[1].reason == 'OSError: no room'
  assert not any(run.figures for run in torn.runs.values())
  assert plain.runs[0].curve['step'][-1] == STEPS


def test_what_was_measured_on_media_is_a_figure(sweep):
  """Means over the sources that have it, and each; of runs that were not measured there is none."""
  sources = {'A': {'exact': 0.5, 'f1': 0.2}, 'B': {'exact': 0.7}}
  text = json.dumps({'step': STEPS, 'sources': sources})
  (sweep / 'plain/seed_1/media.json').write_text(text, encoding='utf-8')
  plain = collect(sweep).variants['plain']
  assert plain.finished('exact') == pytest.approx({1: 0.6})
  assert plain.finished('f1') == pytest.approx({1: 0.2})
  assert plain.finished('B/exact') == pytest.approx({1: 0.7})


def test_cost_of_the_variants(sweep):
  plain, wide, _ = collect(sweep).variants.values()
  assert (wide.train_steps, wide.asked_steps) == (STEPS, 50)
  assert wide.parameters > plain.parameters > plain.active > 0
  # Three times the forward pass, which is two for every parameter that a token meets, and mixing.
  tokens = STEPS * 8 * 64
  assert plain.flops > 6 * plain.active * tokens
  assert wide.flops > 1.5 * plain.flops


def test_a_run_that_learnt_nothing_diverged(sweep):
  write_trial(sweep / 'wide/seed_2', 'finished', final=6.0)
  run = collect(sweep).variants['wide'].runs[2]
  assert (run.status, run.reason) == ('diverged', 'its loss is no lower than at its first step')


def test_results_are_read_back_and_those_of_another_version_refused(sweep, tmp_path):
  results = collect(sweep)
  path = tmp_path / 'results.json'
  write_results(path, results)
  assert read_results(path) == results
  data = json.loads(path.read_text())
  path.write_text(json.dumps({**data, 'version': '999.1.0'}))
  with pytest.raises(ConfigError, match=f'999.1.0, this is {deepseek_jax.__version__}'):
    read_results(path)
  path.write_text('{}')
  with pytest.raises(ConfigError, match='no results'):
    read_results(path)


def test_what_is_no_sweep_is_said(tmp_path, sweep):
  with pytest.raises(ConfigError, match=r'no sweep here'):
    collect(tmp_path / 'nothing')
