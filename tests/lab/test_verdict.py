"""What is said of a sweep: sure differences, unsure ones, too few seeds, runs that went wrong."""

import dataclasses
import re

import numpy as np
import pytest

from deepseek_jax.lab.results import Results, Run, VariantResult, read_results, write_results
from deepseek_jax.lab.sweep_page import sentences, sweep_page
from deepseek_jax.lab.sweep_pictures import is_ladder, look, pictures, write_pictures
from deepseek_jax.lab.verdict import FIGURES, compare, headers, markdown, rows

NOISE = np.random.default_rng(5).normal(0, 0.05, 8)


def a_run(value: float | None, status: str = 'finished') -> Run:
  good = status == 'finished'
  steps = list(range(1, 101))
  return Run(
    status=status,
    step=100,
    reason=None if good else 'SkippedStepsError: 20 in a row',
    figures={'bits_per_byte': value, 'loss': 2 * value} if good and value else {},
    curve={'step': steps, 'value': [5 / step**0.5 for step in steps]},
  )


def a_variant(runs: list[Run], flops: float = 1e12, **changes) -> VariantResult:
  return VariantResult(
    **{
      'changes': ('model.depth: 2 → 4',),
      'values': {'model.depth': '4'},
      'train_steps': 100,
      'asked_steps': 100,
      'parameters': 12345,
      'active': 2345,
      'flops': flops,
      'runs': dict(enumerate(runs)),
      **changes,
    }
  )


@pytest.fixture
def results() -> Results:
  """Four seeds that the variants share, and what each does beside them."""
  base = [2 + n for n in NOISE[:4]]
  return Results(
    question='a_question',
    version='0.1.0',
    baseline='plain',
    match='FlopsPerToken()',
    precision=None,
    platform='cpu',
    figure='bits_per_byte',
    variants={
      'plain': a_variant([a_run(value) for value in base]),
      'better': a_variant([a_run(v - 0.2 + n / 20) for v, n in zip(base, NOISE[4:])]),
      'same': a_variant([a_run(v + n) for v, n in zip(base, NOISE[4:])], asked_steps=120),
      'torn': a_variant([a_run(base[0] - 1), a_run(None, 'diverged'), a_run(None, 'failed')]),
      'gone': a_variant([a_run(None, 'diverged')] * 4),
    },
  )


def verdicts(results: Results) -> dict[str, str]:
  return {one.name: one.verdict for one in compare(results)}


def test_verdicts(results):
  found = verdicts(results)
  assert found['plain'] == 'baseline'
  assert found['better'] == 'lower'
  assert found['same'].startswith('not distinguishable')
  assert found['torn'] == 'one seed: cannot be told; 1 of 3 diverged; 1 of 3 failed'
  assert found['gone'] == 'no finished run; 4 of 4 diverged'


def test_what_diverged_is_not_averaged_away(results):
  lines = {row[0]: row for row in rows(results)}
  assert lines['gone'][5:7] == ('—', '0')
  assert lines['torn'][5] == f'{2 + NOISE[0] - 1:.4f} ± ?'
  dotted = [line for line in pictures(results)['curves'].axes[0].lines if line.get_ls() == ':']
  assert len(dotted) == 5


def test_the_table_says_what_was_adjusted_and_how_sure_it_is(results):
  text = markdown(results)
  assert '100 (from 120)' in text
  assert 'less plain [95%]' in text
  mean = np.mean(NOISE[4:]) / 20 - 0.2
  assert f'{mean:+.4f} [' in text
  assert 'With 4 comparisons the chance' in text
  widths = {line.count('|') for line in text.splitlines() if line.startswith('|')}
  assert widths == {len(headers(results)) + 1}


def test_two_seeds_are_called_few(results):
  few = {
    name: dataclasses.replace(variant, runs=dict(list(variant.runs.items())[:2]))
    for name, variant in results.variants.items()
  }
  found = dataclasses.replace(results, variants=few)
  assert verdicts(found)['same'].startswith('not distinguishable, with 2 seeds')
  assert 'too few to decide' in markdown(found)


def test_results_come_back_from_their_file(results, tmp_path):
  write_results(tmp_path / 'results.json', results)
  assert read_results(tmp_path / 'results.json') == results


def test_the_page_is_whole_and_loads_nothing(results):
  page = sweep_page(results)
  assert sentences(results)[0].startswith('better is lower than plain by')
  for text in ('Verdict', 'not distinguishable', 'SkippedStepsError', 'FlopsPerToken()'):
    assert text in page
  assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_a_figure_that_only_some_have_is_shown(results):
  page = sweep_page(results)
  assert FIGURES['mtp_acceptance'] not in page
  found = results.variants['better']
  runs = {
    seed: dataclasses.replace(run, figures={**run.figures, 'mtp_acceptance': 0.5})
    for seed, run in found.runs.items()
  }
  some = {**results.variants, 'better': dataclasses.replace(found, runs=runs)}
  results = dataclasses.replace(results, variants=some)
  assert FIGURES['mtp_acceptance'] in sweep_page(results)
  lines = {one.name: one for one in compare(results, 'mtp_acceptance')}
  assert lines['better'].verdict == 'the baseline has none'
  assert lines['same'].verdict == 'has none'
  assert lines['gone'].verdict.startswith('no finished run')
  assert [row[5] for row in rows(results, 'mtp_acceptance')][:2] == ['—', '0.5000 ± 0.0000']


def test_groups_are_compared_each_within_itself(results):
  noise = NOISE[:3]
  sizes = {
    f'size_{n},{label}': a_variant(
      [a_run(3 - 0.2 * n + less + x / 20) for x in noise], flops=10.0 ** (10 + n)
    )
    for n in range(3)
    for label, less in (('rule', 0.0), ('low', 0.1 * (n - 1)))
  }
  ladder = dataclasses.replace(results, baseline='rule', variants=sizes)
  found = verdicts(ladder)
  assert {one.against for one in compare(ladder) if one.name.startswith('size_1')} == {
    'size_1,rule'
  }
  assert [found[f'size_{n},rule'] for n in range(3)] == ['baseline'] * 3
  lows = [found[f'size_{n},low'].split(' (')[0] for n in range(3)]
  assert lows == ['lower', 'not distinguishable', 'higher']
  assert 'less rule' in ' '.join(headers(ladder))
  assert sentences(ladder)[0].startswith('size_0,low is lower than size_0,rule by 0.1000')
  legend = pictures(ladder)['scaling'].axes[0].get_legend()
  assert [text.get_text().split(':')[0] for text in legend.get_texts()] == ['rule', 'low']


def test_curves_can_be_told_apart(results):
  """Twenty look different; many names stand beside the axes, few among the curves."""
  assert len({look(number) for number in range(20)}) == 20

  def legends(count):
    variants = {f'v{n}': results.variants[results.baseline] for n in range(count)}
    some = dataclasses.replace(results, baseline='v0', variants=variants)
    picture = pictures(some)['curves']
    texts = [len(legend.get_texts()) for legend in picture.legends]
    among = picture.axes[0].get_legend()
    return texts, among and len(among.get_texts())

  assert legends(3) == ([], 3)
  assert legends(8) == ([8], None)


def test_pictures(results, tmp_path):
  assert set(pictures(results)) == {'curves', 'differences', 'gaps'}
  sizes = {
    f'size{n}': a_variant(
      [a_run(2.5 - 0.2 * n + x / 20) for x in NOISE[:3]], flops=10.0 ** (10 + n)
    )
    for n in range(4)
  }
  ladder = dataclasses.replace(results, baseline='size0', variants=sizes)
  assert is_ladder(ladder)
  # A law through one large variant and many small ones of other kinds would say nothing.
  close = {
    name: dataclasses.replace(v, flops=1e10 + n) for n, (name, v) in enumerate(sizes.items())
  }
  close['size3'] = dataclasses.replace(close['size3'], flops=3e10)
  assert not is_ladder(dataclasses.replace(ladder, variants=close))
  files = write_pictures(tmp_path, ladder)
  assert {path.name for path in files} >= {'scaling.svg', 'scaling.png', 'differences.svg'}
  again = [path.read_bytes() for path in files]
  write_pictures(tmp_path, ladder)
  assert again == [path.read_bytes() for path in files]
