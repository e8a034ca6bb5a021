"""What a sweep's results say, and how surely: one table, in words that can be cited."""

import dataclasses
import math
from collections.abc import Mapping

from deepseek_jax.core.describe import si
from deepseek_jax.lab.results import Results, VariantResult
from deepseek_jax.lab.statistics import (
  CONFIDENCE,
  Difference,
  Summary,
  paired_difference,
  summarise,
)

UNITS = {'bits_per_byte': 'bits per byte', 'loss': 'nats a token'}
FIGURES: Mapping[str, str] = {
  'bits_per_byte': 'held-out bits per byte',
  'loss': 'held-out loss, nats a token',
  'train_loss': 'training loss, nats a token',
  'train_mtp_loss': 'MTP training loss, nats a token',
  'max_violation': 'max violation, highest layer',
  'dead_experts': 'dead experts, share, highest layer',
  'load_entropy': 'entropy of the load, lowest layer',
  'tokens_per_second': 'tokens per second',
}
ENOUGH = 3
"""Pairs below which no interval is narrow enough to be of use."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
  """A variant's figure beside the baseline's.

  Attributes:
    name: of the variant.
    summary: of its finished runs, or None where there is none.
    difference: from the baseline, or None for the baseline itself or without a finished run.
    diverged: runs that diverged.
    failed: runs that failed.
    unfinished: runs that are not done.
    verdict: what can be said.
  """

  name: str
  summary: Summary | None
  difference: Difference | None
  diverged: int
  failed: int
  unfinished: int
  verdict: str


def compare(results: Results, figure: str | None = None) -> list[Compared]:
  """Compares every variant with the baseline, by the seeds that both finished.

  Args:
    results: of the sweep.
    figure: a name of `FIGURES`; the one that decides by default.
  """
  figure = figure or results.figure
  baseline = results.variants[results.baseline].finished(figure)
  return [
    _compared(name, variant, figure, None if name == results.baseline else baseline)
    for name, variant in results.variants.items()
  ]


def _compared(
  name: str, variant: VariantResult, figure: str, baseline: Mapping[int, float] | None
) -> Compared:
  values = variant.finished(figure)
  difference = None if baseline is None or not values else paired_difference(values, baseline)
  return Compared(
    name=name,
    summary=summarise(list(values.values())) if values else None,
    difference=difference,
    diverged=variant.count('diverged'),
    failed=variant.count('failed'),
    unfinished=variant.count('unfinished'),
    verdict=_verdict(variant, values, difference, baseline is None),
  )


def _verdict(
  variant: VariantResult,
  values: Mapping[int, float],
  difference: Difference | None,
  is_baseline: bool,
) -> str:
  remarks = [
    f'{count} of {len(variant.runs)} {status}'
    for status in ('diverged', 'failed', 'unfinished')
    if (count := variant.count(status))
  ]
  if is_baseline:
    remarks.insert(0, 'baseline')
  elif not values:
    remarks.insert(0, 'no finished run')
  elif difference is None or not difference.pairs:
    remarks.insert(0, 'no seed in common with the baseline')
  elif difference.pairs < 2:
    remarks.insert(0, 'one seed: cannot be told')
  elif not difference.known:
    few = f', with {difference.pairs} seeds' if difference.pairs < ENOUGH else ''
    remarks.insert(0, f'not distinguishable{few}')
  else:
    remarks.insert(0, 'lower' if difference.mean < 0 else 'higher')
  return '; '.join(remarks)


HEADERS = ('variant', 'steps', 'parameters', 'met by a token', 'FLOPs', 'mean ± error', 'seeds')


def rows(results: Results, figure: str | None = None) -> list[tuple[str, ...]]:
  """Returns the cells of the table, one row a variant, under `headers`."""
  lines: list[tuple[str, ...]] = []
  for compared in compare(results, figure):
    variant = results.variants[compared.name]
    steps = f'{variant.train_steps:,}'
    if variant.asked_steps != variant.train_steps:
      steps += f' (from {variant.asked_steps:,})'
    summary, difference = compared.summary, compared.difference
    lines.append(
      (
        compared.name,
        steps,
        si(variant.parameters),
        si(variant.active),
        f'{variant.flops:.3g}',
        '—' if summary is None else _with_error(summary),
        '0' if summary is None else str(summary.seeds),
        '' if difference is None else _interval(difference),
        compared.verdict,
      )
    )
  return lines


def headers(results: Results) -> tuple[str, ...]:
  """Returns the names of the columns of `rows`."""
  return (*HEADERS, f'less {results.baseline} [{CONFIDENCE:.0%}]', 'verdict')


def _with_error(summary: Summary) -> str:
  error = '' if math.isnan(summary.error) else f' ± {_figure(summary.error)}'
  return f'{_figure(summary.mean)}{error}'


def _interval(difference: Difference) -> str:
  if math.isnan(difference.mean):
    return ''
  ends = '' if math.isnan(difference.low) else f' [{difference.low:+.4f}, {difference.high:+.4f}]'
  return f'{difference.mean:+.4f}{ends}'


def _figure(value: float) -> str:
  return f'{value:.4f}' if abs(value) < 100 else f'{value:,.0f}'


def markdown(results: Results, figure: str | None = None) -> str:
  """Returns the table in Markdown, with a line on what it is."""
  figure = figure or results.figure
  head = headers(results)
  lines = ['| ' + ' | '.join(head) + ' |', '|---' + '|---:' * (len(head) - 2) + '|---|']
  lines += ['| ' + ' | '.join(row) + ' |' for row in rows(results, figure)]
  return '\n'.join(lines) + f'\n\n{caption(results, figure)}\n'


def caption(results: Results, figure: str) -> str:
  """Returns what the numbers are, and what they cannot say."""
  others = len(results.variants) - 1
  text = (
    f'{FIGURES[figure]}; mean over seeds ± standard error. Differences are paired by seed, with '
    f'the wider of a bootstrap and a Student interval at {CONFIDENCE:.0%}.'
  )
  if others > 2:
    chance = 1 - CONFIDENCE**others
    text += (
      f' With {others} comparisons the chance that one of them seems to differ and does not is '
      f'{chance:.0%} or less.'
    )
  most = max(len(variant.runs) for variant in results.variants.values())
  if most < ENOUGH:
    text += f' {most} seed(s) are too few to decide anything but the largest differences.'
  return text
