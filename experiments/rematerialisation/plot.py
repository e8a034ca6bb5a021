"""Tables and the picture of what was measured, with the fitted exponents.

  python -m experiments.rematerialisation.plot

Reads `results.jsonl` beside this file, prints Markdown tables and writes `memory.png`.
"""

import json
import pathlib
from typing import Any

import matplotlib
import numpy as np

FOLDER = pathlib.Path(__file__).parent
NAMES = {
  'none': 'none',
  'save': 'Save(attention)',
  'square_root': 'SquareRoot',
  'every_layer': 'EveryLayer',
  'compressed': 'Compressed',
}
COLOURS = ('#222222', '#009E73', '#D55E00', '#0072B2', '#CC79A7')
MEGABYTE = 2**20

Rows = list[dict[str, Any]]


def fit(depths: np.ndarray, sizes: np.ndarray) -> tuple[float, float, float]:
  """Fits c + a·L^p by least squares of relative errors, c and a not negative.

  Args:
    depths: [n] layers L.
    sizes: [n] bytes.

  Returns:
    c, a and p.
  """
  best = (np.inf, 0.0, 0.0, 0.0)
  for power in np.linspace(0.05, 1.5, 291):
    for columns in ([np.ones_like(depths), depths**power], [depths**power]):
      matrix = np.stack(columns, axis=1) / sizes[:, None]
      solution, *_ = np.linalg.lstsq(matrix, np.ones_like(sizes))
      error = float(np.sum((matrix @ solution - 1) ** 2))
      constant, slope = (0.0, *solution) if len(solution) == 1 else solution
      if constant >= 0 and slope >= 0 and error < best[0] - 1e-12:
        best = (error, float(constant), float(slope), float(power))
  return best[1:]


def table(head: list[str], rows: list[list[str]]) -> str:
  """Returns a Markdown table."""
  lines = [head, ['---'] + ['---:'] * (len(head) - 1), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def memory(rows: Rows) -> tuple[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
  """Returns the table of activations by kind and depth, and the curves."""
  curves = {}
  for kind in NAMES:
    points = sorted((r['depth'], r['temporary_bytes']) for r in rows if r['kind'] == kind)
    curves[kind] = (
      np.array([depth for depth, _ in points], float),
      np.array([size for _, size in points], float),
    )
  depths = [int(depth) for depth in curves['none'][0]]
  lines = []
  for kind, (x, y) in curves.items():
    constant, slope, power = fit(x, y)
    wide = np.log(y[-1] / y[0]) / np.log(x[-1] / x[0])
    cells = [f'{size / MEGABYTE:.1f}' for size in y]
    law = f'{constant / MEGABYTE:.1f} + {slope / MEGABYTE:.3f}·L^{power:.2f}'
    lines.append([NAMES[kind], *cells, f'{wide:.2f}', law])
  head = ['activations, MiB', *map(str, depths), 'slope in log–log', 'fitted']
  return table(head, lines), curves


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], target: pathlib.Path) -> None:
  """Draws memory against depth, both logarithmic."""
  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4.2), layout='constrained')
  for (kind, (x, y)), colour in zip(curves.items(), COLOURS, strict=True):
    axes.loglog(x, y / MEGABYTE, 'o', color=colour)
    constant, slope, power = fit(x, y)
    smooth = np.geomspace(x[0], x[-1], 100)
    axes.loglog(smooth, (constant + slope * smooth**power) / MEGABYTE, color=colour, lw=1)
    axes.annotate(
      f'{NAMES[kind]}, p = {power:.2f}',
      (x[-1], y[-1] / MEGABYTE),
      textcoords='offset points',
      xytext=(8, -3),
      color=colour,
    )
  axes.set_xticks(curves['none'][0], [f'{int(depth)}' for depth in curves['none'][0]])
  axes.set_yticks([20, 50, 100, 200, 500], ['20', '50', '100', '200', '500'])
  axes.minorticks_off()
  axes.set_xlim(right=curves['none'][0][-1] * 3.2)
  axes.set_xlabel('layers L')
  axes.set_ylabel('activations of a step, MiB')
  axes.set_title('Memory against depth; lines are fits of c + a·L^p', loc='left', fontsize=10)
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(target, dpi=130)


def ratio_table(head: list[str], rows: Rows, ratio: str) -> str:
  """Returns a table of variants with their reserved memory and a ratio with its middle half."""
  lines = []
  for row in rows:
    middle = '–'.join(f'{x:.2f}' for x in row[f'{ratio}_quarters'])
    size = f'{row["temporary_bytes"] / MEGABYTE:.0f}'
    lines.append([row.get('variant') or NAMES[row['kind']], size, f'{row[ratio]:.2f}', middle])
  return table(head, lines)


def losses(rows: Rows) -> str:
  """Returns what compression changes, seed by seed, beside what float32 rounding alone changes."""
  seeds: dict[int, dict[str, dict[str, Any]]] = {}
  for row in rows:
    seeds.setdefault(row['seed'], {})[row['kind']] = row
  lines = []
  for key in ('train_loss', 'bits_per_byte'):
    exact = [kinds['every_layer'][key] for kinds in seeds.values()]
    lines.append([f'{key}, EveryLayer', plus_minus(exact, ''), *(f'{x:.4f}' for x in exact)])
    for kind in ('none', 'compressed'):
      gaps = [kinds[kind][key] - kinds['every_layer'][key] for kinds in seeds.values()]
      label = f'{NAMES[kind]} less EveryLayer'
      lines.append([label, plus_minus(gaps, '+'), *(f'{gap:+.4f}' for gap in gaps)])
  return table(['', 'mean ± deviation of seeds', *(f'seed {seed}' for seed in seeds)], lines)


def plus_minus(values: list[float], sign: str) -> str:
  """Returns mean ± standard deviation."""
  return f'{np.mean(values):{sign}.4f} ± {np.std(values, ddof=1):.4f}'


def main() -> None:
  """Prints the tables and draws the picture."""
  text = (FOLDER / 'results.jsonl').read_text(encoding='utf-8')
  rows: Rows = [json.loads(line) for line in text.splitlines()]

  def of(what: str) -> Rows:
    return [row for row in rows if row['what'] == what]

  sizes, curves = memory(of('gradient_memory'))
  print(sizes)
  draw(curves, FOLDER / 'memory.png')
  lines = [
    [NAMES[row['kind']], str(row['depth']), f'{row["temporary_bytes"] / MEGABYTE:.1f}']
    for row in of('step_memory')
  ]
  print(table(['whole steps', 'depth', 'reserved, MiB'], lines))
  print(ratio_table(['kind', 'reserved, MiB', 'time', 'middle half'], of('time'), 'ratio'))
  head = ['variant', 'reserved, MiB', 'speed', 'middle half']
  print(ratio_table(head, of('accumulation'), 'speed_ratio'))
  print(losses(of('loss')))
  blocks = sorted({row['block'] for row in of('gradient')})
  lines = [
    [
      str(block),
      *(
        plus_minus([r[key] for r in of('gradient') if r['block'] == block], '')
        for key in ('error', 'cosine')
      ),
    ]
    for block in blocks
  ]
  print(table(['block', 'relative error of gradients', 'cosine'], lines))


if __name__ == '__main__':
  main()
