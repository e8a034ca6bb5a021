"""The report of a sweep: one self-contained page with verdicts, curves and every run."""

import base64
import io

from matplotlib.figure import Figure

from deepseek_jax.lab.results import Results
from deepseek_jax.lab.sweep_pictures import pictures
from deepseek_jax.lab.verdict import FIGURES, caption, compare, headers, rows, short
from deepseek_jax.train.page import markup

TITLES = {
  'curves': 'Training loss against compute',
  'differences': 'Differences from the baseline',
  'gaps': 'Training loss less that of the baseline at equal steps, seed by seed',
  'scaling': 'Loss against compute, and beyond',
}


def sweep_page(results: Results) -> str:
  """Returns the page."""
  lead = [markup.paragraph(sentence) for sentence in sentences(results)]
  table = markup.table(headers(results), rows(results), numeric=0)
  parts = [('verdict', 'Verdict', table + markup.paragraph(caption(results, results.figure)))]
  drawn = pictures(results)
  parts += [(name, TITLES[name], _image(picture, TITLES[name])) for name, picture in drawn.items()]
  others = [name for name in FIGURES if name != results.figure and _somewhere(results, name)]
  if others:
    parts.append(('figures', 'Other figures', ''.join(_other(results, name) for name in others)))
  parts.append(('variants', 'Variants', _variants(results)))
  parts.append(('runs', 'Runs', _runs(results)))
  sections = [(name, title, markup.section(name, title, body)) for name, title, body in parts]
  return markup.document(results.question, '\n'.join(lead), sections)


def sentences(results: Results) -> list[str]:
  """Returns what was found, a sentence for each variant that differs from the baseline."""
  unit = FIGURES[results.figure]
  lines = []
  for one in compare(results):
    if one.difference is not None and one.difference.known:
      low, high = one.difference.low, one.difference.high
      lines.append(
        f'{one.name} is {one.verdict} than {one.against} by {abs(one.difference.mean):.4f} '
        f'({min(abs(low), abs(high)):.4f} to {max(abs(low), abs(high)):.4f}) in {unit}, '
        f'{one.difference.pairs} seeds.'
      )
    elif one.name != one.against:
      lines.append(f'{one.name}: {one.verdict}.')
  return lines


def _image(picture: Figure, title: str) -> str:
  buffer = io.BytesIO()
  picture.savefig(buffer, format='svg', metadata={'Date': None})
  data = base64.b64encode(buffer.getvalue()).decode()
  # Drawn for white paper: it keeps its own background on a dark page.
  return (
    f'<p><img alt="{markup.escape(title)}" style="max-width:100%;background:#fff" '
    f'src="data:image/svg+xml;base64,{data}"></p>'
  )


def _somewhere(results: Results, figure: str) -> bool:
  return any(variant.finished(figure) for variant in results.variants.values())


def _other(results: Results, figure: str) -> str:
  lines = [short(row) for row in rows(results, figure)]
  return markup.table(short(headers(results)), lines, caption=FIGURES[figure])


def _variants(results: Results) -> str:
  lines = [
    (name, '\n'.join(variant.changes) or '(the base)', f'{variant.train_steps:,}')
    for name, variant in results.variants.items()
  ]
  match = f'Steps were matched by {results.match}.' if results.match else 'Steps were not matched.'
  return markup.table(('variant', 'changes', 'steps'), lines) + markup.paragraph(match)


def _runs(results: Results) -> str:
  lines = []
  for name, variant in results.variants.items():
    for seed, run in variant.runs.items():
      value = run.figures.get(results.figure)
      figure = '—' if value is None else f'{value:.4f}'
      lines.append((name, str(seed), run.status, f'{run.step:,}', figure, run.reason or ''))
  head = ('variant', 'seed', 'status', 'step', FIGURES[results.figure], 'reason')
  return markup.table(head, lines)
