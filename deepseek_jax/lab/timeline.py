"""Pictures of pipelines: what every device does when."""

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from deepseek_jax.core.config import ConfigError
from deepseek_jax.lab.picture import COLOURS, Picture
from deepseek_jax.pods.schedule.plan import BACKWARD, FORWARD, INPUT, WEIGHT
from deepseek_jax.pods.schedule.simulate import Timeline

LOOK = {
  FORWARD: (COLOURS[0], 'forward'),
  BACKWARD: (COLOURS[1], 'backward'),
  INPUT: (COLOURS[4], 'gradient of what came in'),
  WEIGHT: (COLOURS[2], 'gradient of weights'),
}
PAIR = (COLOURS[3], 'forward and backward, overlapping')
MOST_NUMBERS = 400
"""Pieces of work of one timeline whose microbatches are written into them."""


def draw_timelines(timelines: Mapping[str, Timeline], unit: str = 'seconds') -> Picture:
  """Draws one below the other, on the same axis of time: a row a device, a bar for each slot.

  Args:
    timelines: name → what happens when.
    unit: of their times.

  Raises:
    ConfigError: there is none.
  """
  if not timelines:
    raise ConfigError('draw_timelines: expected at least 1 timeline, found none')
  heights = [0.9 + 0.22 * timeline.plan.stages for timeline in timelines.values()]
  picture = Picture(figsize=(10.5, 0.7 + sum(heights)), layout='constrained')
  rows = picture.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=heights)
  kinds: set[str] = set()
  for axes, (name, timeline) in zip(rows[:, 0], timelines.items(), strict=True):
    kinds |= _draw(axes, timeline)
    axes.set_title(f'{name}: bubble {timeline.bubble:.1%}', loc='left', fontsize=9)
  rows[-1, 0].set_xlabel(unit)
  looks = {**LOOK, 'pair': PAIR}
  handles = [Patch(color=looks[kind][0], label=looks[kind][1]) for kind in looks if kind in kinds]
  picture.legend(handles=handles, loc='outside upper left', ncols=5, frameon=False, fontsize=8)
  return picture


def _draw(axes: Axes, timeline: Timeline) -> set[str]:
  """Draws one timeline; returns the kinds of bars that it has."""
  stages = timeline.plan.stages
  numbered = len(timeline.events) <= MOST_NUMBERS
  bars: dict[tuple[int, str], list[tuple[float, float]]] = {}
  for event in timeline.events:
    kind = event.slot[0].kind if len(event.slot) == 1 else 'pair'
    width = event.end - event.start
    bars.setdefault((event.device, kind), []).append((event.start, width))
    if numbered and width > timeline.makespan / 120:
      text = '+'.join(str(op.microbatch) for op in event.slot)
      middle = event.start + width / 2
      axes.text(middle, event.device, text, ha='center', va='center', fontsize=5.5, color='white')
  for (device, kind), spans in bars.items():
    colour = PAIR[0] if kind == 'pair' else LOOK[kind][0]
    axes.broken_barh(
      spans, (device - 0.42, 0.84), facecolor=colour, edgecolor='white', linewidth=0.3
    )
  axes.set_yticks(range(stages), [str(device) for device in range(stages)], fontsize=7)
  axes.set_ylabel('device', fontsize=8)
  axes.invert_yaxis()
  axes.spines[['top', 'right']].set_visible(False)
  return {kind for _, kind in bars}
