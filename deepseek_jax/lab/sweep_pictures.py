"""Pictures of a sweep, fit for a paper: curves, differences with intervals, scaling."""

import pathlib
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deepseek_jax.lab.groups import families, pair_up
from deepseek_jax.lab.picture import COLOURS, Picture
from deepseek_jax.lab.results import Results, VariantResult, digest
from deepseek_jax.lab.statistics import CONFIDENCE, fit_power_law, scaling_band
from deepseek_jax.lab.verdict import FIGURES, compare

BEYOND = 10
"""How far beyond the largest run a scaling curve is drawn, in compute."""
DASHES = ('-', '--', ':', '-.')
"""What tells curves of one colour apart."""
MANY = 5
"""Names that fit among the curves."""


def look(number: int) -> tuple[str, str]:
  """Returns colour and dashes of the curve of variant `number`."""
  turn, colour = divmod(number, len(COLOURS))
  return COLOURS[colour], DASHES[turn % len(DASHES)]


def explain(figure: Picture, axes: Axes) -> None:
  """Names the curves: beside them where they are many, or they would be hidden."""
  if len(axes.get_legend_handles_labels()[1]) > MANY:
    figure.legend(loc='outside right upper', frameon=False, fontsize=8)
  else:
    axes.legend(frameon=False, fontsize=8)


def figure_of(width: float = 6.4, height: float = 3.9) -> tuple[Picture, Axes]:
  """Returns an empty picture and its axes."""
  figure = Picture(figsize=(width, height), layout='constrained')
  axes = figure.subplots()
  axes.spines[['top', 'right']].set_visible(False)
  return figure, axes


def draw_curves(results: Results) -> Figure:
  """Draws training loss against FLOPs: the mean of the seeds, and the range of them.

  Runs that diverged are drawn too, dotted and each by itself.
  """
  figure, axes = figure_of()
  for number, (name, variant) in enumerate(results.variants.items()):
    colour, dashes = look(number)
    per_step = variant.flops / variant.train_steps
    good = [run.curve for run in variant.runs.values() if run.status == 'finished']
    if good:
      grid = np.linspace(max(c['step'][0] for c in good), min(c['step'][-1] for c in good), 200)
      values = np.stack([np.interp(grid, c['step'], c['value']) for c in good])
      axes.plot(grid * per_step, values.mean(axis=0), label=name, lw=1.4, color=colour, ls=dashes)
      if len(values) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        axes.fill_between(grid * per_step, low, high, color=colour, alpha=0.2, lw=0)
    torn = [run.curve for run in variant.runs.values() if run.status == 'diverged' and run.curve]
    for at, curve in enumerate(torn):
      steps = np.asarray(curve['step']) * per_step
      label = f'{name}, diverged' if at == 0 else None
      axes.plot(steps, curve['value'], color=colour, ls=':', lw=1, label=label)
  axes.set_xlabel('training FLOPs')
  axes.set_ylabel('training loss, nats a token')
  _zoom(axes, results)
  explain(figure, axes)
  return figure


def _zoom(axes: Axes, results: Results) -> None:
  """Shows the latter nine tenths of training: the first steps would flatten the rest."""
  curves = [
    run.curve['value'][len(run.curve['value']) // 10 :]
    for variant in results.variants.values()
    for run in variant.runs.values()
    if run.status == 'finished'
  ]
  if curves:
    low, high = min(map(min, curves)), max(map(max, curves))
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def draw_gaps(results: Results) -> Figure:
  """Draws training loss less the baseline's at the same step of the same seed.

  Both have then read the same text, whose share in the loss goes away. Mean of the seeds and the
  range of them; finished runs only. Equal steps need not be equal cost.
  """
  figure, axes = figure_of()
  for number, (name, pair) in enumerate(pair_up(results.baseline, results.variants).items()):
    curves, other = (
      _finished_curves(results.variants[name]),
      _finished_curves(results.variants[pair]),
    )
    shared = [seed for seed in curves if seed in other]
    if name == pair or not shared:
      continue
    both = [curve for seed in shared for curve in (curves[seed], other[seed])]
    # Where a curve ends it is smoothed over other steps than one that goes on.
    grid = np.linspace(max(x[0] for x, _ in both), 0.95 * min(x[-1] for x, _ in both), 100)
    gaps = np.stack([np.interp(grid, *curves[s]) - np.interp(grid, *other[s]) for s in shared])
    colour, dashes = look(number)
    axes.plot(grid, gaps.mean(axis=0), label=name, lw=1.4, color=colour, ls=dashes)
    if len(gaps) > 1:
      axes.fill_between(grid, gaps.min(axis=0), gaps.max(axis=0), color=colour, alpha=0.2, lw=0)
  axes.axhline(0, color='#222222', lw=0.8)
  axes.set_xlabel('steps, each with the same text')
  axes.set_ylabel(f'training loss, nats a token, less {results.baseline}')
  explain(figure, axes)
  return figure


def _finished_curves(variant: VariantResult) -> dict[int, tuple[np.ndarray, np.ndarray]]:
  """Returns seed → steps and smoothed training loss, of finished runs."""
  return {
    seed: (np.asarray(run.curve['step']), np.asarray(run.curve['value']))
    for seed, run in variant.runs.items()
    if run.status == 'finished'
  }


def draw_differences(results: Results, figure_name: str | None = None) -> Figure:
  """Draws each variant's difference from the baseline: every seed, the mean, the interval."""
  name = figure_name or results.figure
  compared = [c for c in compare(results, name) if c.difference and c.difference.pairs]
  figure, axes = figure_of(height=1.2 + 0.45 * max(len(compared), 1))
  for at, one in enumerate(reversed(compared)):
    difference = one.difference
    assert difference is not None
    colour = COLOURS[0] if difference.known else '#888888'
    values = results.variants[one.name].finished(name)
    baseline = results.variants[one.against].finished(name)
    points = [values[seed] - baseline[seed] for seed in values if seed in baseline]
    axes.plot(points, [at] * len(points), 'o', color=colour, ms=3.5, alpha=0.5)
    if difference.pairs > 1:
      axes.plot([difference.low, difference.high], [at, at], color=colour, lw=1.6)
    axes.plot(difference.mean, at, 'D', color=colour, ms=6)
  axes.axvline(0, color='#222222', lw=0.8)
  axes.set_yticks(range(len(compared)), [one.name for one in reversed(compared)])
  axes.set_ylim(-0.6, len(compared) - 0.4)
  axes.set_xlabel(
    f'{FIGURES[name]}, less {results.baseline}\n'
    f'points: seeds; bar: {CONFIDENCE:.0%} interval; grey: not distinguishable',
    fontsize=9,
  )
  return figure


def draw_scaling(results: Results) -> Figure:
  """Draws the deciding figure against training FLOPs, and the law fitted to each family."""
  figure, axes = figure_of()
  for number, (family, names) in enumerate(families(results.baseline, results.variants).items()):
    points = [
      (results.variants[name].flops, value)
      for name in names
      for value in results.variants[name].finished(results.figure).values()
    ]
    if points:
      colour = COLOURS[number % len(COLOURS)]
      compute, loss = (np.array(column) for column in zip(*points, strict=True))
      axes.plot(compute, loss, 'o', color=colour, ms=4)
      _draw_law(axes, compute, loss, colour, family)
  axes.set_xscale('log')
  axes.set_xlabel('training FLOPs')
  axes.set_ylabel(FIGURES[results.figure])
  explain(figure, axes)
  return figure


def _draw_law(axes: Axes, compute: np.ndarray, loss: np.ndarray, colour: str, family: str) -> None:
  sizes = np.unique(compute)
  if len(sizes) < 2:
    axes.plot([], [], 'o', color=colour, label=f'{family or "runs"}: one size, no law')
    return
  law = fit_power_law(compute, loss)
  inside = np.geomspace(sizes[0], sizes[-1], 60)
  beyond = np.geomspace(sizes[-1], sizes[-1] * BEYOND, 40)
  floor = f' + {law.floor:.2f}' if law.floor else ''
  formula = f'{law.scale:.3g} · FLOPs^{-law.exponent:.3f}{floor}'
  label = f'{family}: {formula}' if family else formula
  axes.plot(inside, law(inside), color=colour, lw=1.2, label=label)
  axes.plot(beyond, law(beyond), color=colour, lw=1.2, ls='--')
  if min(np.sum(compute == size) for size in sizes) > 1:
    at = np.concatenate([inside, beyond])
    band = scaling_band(compute, loss, at)
    axes.fill_between(at, band.low, band.high, color=colour, alpha=0.15, lw=0)


def is_ladder(results: Results) -> bool:
  """Returns whether some variants are sizes of one thing: then a scaling curve says more.

  That is three sizes or more, each with a quarter more compute than the one before, and the last
  with at least twice that of the first. Two sizes would give a law through two points.
  """
  for names in families(results.baseline, results.variants).values():
    variants = (results.variants[name] for name in names)
    rungs: list[float] = []
    for flops in sorted(v.flops for v in variants if v.finished(results.figure)):
      if not rungs or flops >= 1.25 * rungs[-1]:
        rungs.append(flops)
    if len(rungs) >= 3 and rungs[-1] >= 2 * rungs[0]:
      return True
  return False


def pictures(results: Results) -> Mapping[str, Figure]:
  """Returns name → picture of all that the results have."""
  found = {'curves': draw_curves(results)}
  if any(one.difference and one.difference.pairs for one in compare(results)):
    found['differences'] = draw_differences(results)
    found['gaps'] = draw_gaps(results)
  if is_ladder(results):
    found['scaling'] = draw_scaling(results)
  return found


def drawn_from(results: Results) -> str:
  """Returns what a picture says of where its numbers are from."""
  return f'drawn from results.json, SHA-256 {digest(results)}'


def write_pictures(folder: pathlib.Path, results: Results) -> list[pathlib.Path]:
  """Writes every picture as SVG and PNG; returns the files.

  Each says in its metadata, under `Description`, which results it was drawn from.
  """
  description = drawn_from(results)
  files = []
  for name, figure in pictures(results).items():
    for ending in ('svg', 'png'):
      path = folder / f'{name}.{ending}'
      # Without a date and random names two runs on equal results write equal files.
      metadata = {'Description': description} | ({'Date': None} if ending == 'svg' else {})
      with matplotlib.rc_context({'svg.hashsalt': name}):
        figure.savefig(path, dpi=150, metadata=metadata)
      files.append(path)
  return files
