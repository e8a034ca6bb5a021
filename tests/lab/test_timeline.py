"""Pictures of pipelines."""

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.lab.timeline import draw_timelines
from deepseek_jax.pods.schedule.dual import DualPipe
from deepseek_jax.pods.schedule.kinds import GPipe, ZeroBubbleH1
from deepseek_jax.pods.schedule.plan import Cost
from deepseek_jax.pods.schedule.simulate import simulate

COSTS = (Cost(forward=1.0, backward_input=1.0, backward_weight=1.0, backward=2.0),) * 2


def test_a_bar_for_every_slot(tmp_path):
  kinds = (GPipe(), ZeroBubbleH1(), DualPipe())
  timelines = {repr(kind): simulate(kind.plan(2, 4), COSTS) for kind in kinds}
  picture = draw_timelines(timelines)
  for axes, timeline in zip(picture.axes, timelines.values(), strict=True):
    bars = sum(len(collection.get_paths()) for collection in axes.collections)
    assert bars == len(timeline.events)
    assert len(axes.texts) == len(timeline.events)
  assert picture.axes[0].get_title(loc='left') == 'GPipe(): bubble 20.0%'
  assert len(picture.legends[0].get_texts()) == 5
  picture.savefig(tmp_path / 'a.svg')
  assert (tmp_path / 'a.svg').stat().st_size > 1000


def test_nothing_is_not_drawn():
  with pytest.raises(ConfigError, match='at least 1 timeline'):
    draw_timelines({})
