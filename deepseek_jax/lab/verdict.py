"""What a sweep's results say, and how surely: one table, in words that can be cited."""

import dataclasses
from collections.abc import Mapping

from deepseek_jax.core.describe import si
from deepseek_jax.lab.groups import pair_up
from deepseek_jax.lab.results import Results, VariantResult
from deepseek_jax.lab.statistics import (
  CONFIDENCE,
  ENOUGH,
  Difference,
  Summary,
  paired_difference,
  summarise,
)

FIGURES: Mapping[str, str] = {
  'bits_per_byte': 'held-out bits per byte',
  'loss': 'held-out loss, nats a token',
  'train_loss': 'training loss, nats a token',
  'train_mtp_loss': 'MTP training loss, nats a token',
  'mtp_loss': 'MTP held-out loss, nats a token',
  'mtp_acceptance': 'second token accepted, held-out share',
  'accuracy': 'held-out targets found likeliest, share',
  'max_violation': 'max violation, highest layer',
  'dead_experts': 'dead experts, share, highest layer',
  'load_entropy': 'entropy of the load, lowest layer',
  'tokens_per_second': 'tokens per second',
  'exact': 'held-out answers written to the letter, share',
  'shuffled_exact': 'the same with media of another row, share',
  'f1': 'agreement of words written with the true ones, F1',
  'shuffled_f1': 'the same with media of another row, F1',
  'recall_1': 'own text nearest to a medium, share',
  'recall_5': 'own text among the five nearest to a medium, share',
  'matching': 'own text nearer than one other, share',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
  """A variant's figure beside the baseline's.

  Attributes:
    name: of the variant.
    against: name of the baseline that it is compared with; a baseline's is its own.
    summary: of its finished runs, or None where there is none.
    difference: from the baseline, or None for the baseline itself or without a finished run.
    verdict: what can be said, and how many runs went wrong.
  """

  name: str
  against: str
  summary: Summary | None
  difference: Difference | None
  verdict: str


def compare(results: Results, figure: str | None = None) -> list[Compared]:
  """Compares every variant with the baseline, by the seeds that both finished.

  Args:
    results: of the sweep.
    figure: a name of `FIGURES`; the one that decides by default.
  """
  figure = figure or results.figure
  variants = results.variants
  return [
    _compared(variants, name, against, figure)
    for name, against in pair_up(results.baseline, variants).items()
  ]


def _compared(
  variants: Mapping[str, VariantResult], name: str, against: str, figure: str
) -> Compared:
  variant = variants[name]
  values = variant.finished(figure)
  baseline = None if against == name else variants[against].finished(figure)
  difference = paired_difference(values, baseline) if values and baseline else None
  return Compared(
    name=name,
    against=against,
    summary=summarise(list(values.values())) if values else None,
    difference=difference,
    verdict=_verdict(variant, _said(variant, values, baseline, difference)),
  )


def _said(
  variant: VariantResult,
  values: Mapping[int, float],
  baseline: Mapping[int, float] | None,
  difference: Difference | None,
) -> str:
  if baseline is None:
    return 'baseline'
  if difference is not None:
    return difference.verdict
  if values:
    return 'the baseline has none'
  return 'has none' if variant.count('finished') else 'no finished run'


def _verdict(variant: VariantResult, said: str) -> str:
  remarks = [
    f'{count} of {len(variant.runs)} {status}'
    for status in ('diverged', 'failed', 'unfinished')
    if (count := variant.count(status))
  ]
  return '; '.join([said, *remarks])


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
        '—' if summary is None else summary.text,
        '0' if summary is None else str(summary.seeds),
        '' if difference is None else difference.text,
        compared.verdict,
      )
    )
  return lines


def headers(results: Results) -> tuple[str, ...]:
  """Returns the names of the columns of `rows`."""
  return (*HEADERS, f'less {results.baseline} [{CONFIDENCE:.0%}]', 'verdict')


def short(row: tuple[str, ...]) -> tuple[str, ...]:
  """Leaves out of a row of `rows` or `headers` what is the same for every figure."""
  return (row[0], *row[5:])


def markdown(results: Results, figure: str | None = None) -> str:
  """Returns the table in Markdown, with a line on what it is.

  Steps, sizes and how to read it all are in the table of the figure that decides, and in no other.
  """
  figure = figure or results.figure
  table, words = [headers(results), *rows(results, figure)], caption(results, figure)
  if figure != results.figure:
    table, words = [short(row) for row in table], FIGURES[figure]
  head, *body = table
  lines = ['| ' + ' | '.join(head) + ' |', '|---' + '|---:' * (len(head) - 2) + '|---|']
  lines += ['| ' + ' | '.join(row) + ' |' for row in body]
  return '\n'.join(lines) + f'\n\n{words}\n'


def caption(results: Results, figure: str) -> str:
  """Returns what the numbers are, and what they cannot say."""
  pairs = pair_up(results.baseline, results.variants)
  others = sum(name != pair for name, pair in pairs.items())
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
