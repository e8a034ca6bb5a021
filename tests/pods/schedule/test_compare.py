"""Schedules side by side: the table, the stages, the recommendation."""

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.pods.schedule.compare import (
  EVERY,
  describe_stages,
  draw_text,
  outcome_table,
  recommend,
  try_schedule,
)
from deepseek_jax.pods.schedule.dual import DualPipe
from deepseek_jax.pods.schedule.kinds import Asynchronous, GPipe, OneFOneB, ZeroBubbleV
from deepseek_jax.pods.schedule.plan import Cost

UNIT = Cost(
  forward=1.0,
  backward_input=1.0,
  backward_weight=1.0,
  backward=2.0,
  kept_bytes=1024.0,
  left_bytes=512.0,
  parameter_bytes=4096.0,
)
FREE = Cost(forward=0.0, backward_input=0.0, backward_weight=0.0, backward=0.0)
UNITS = (FREE, *[UNIT] * 16)
NAMES = ('embedding', *(f'layers/{n}' for n in range(16)))


def tried(*schedules):
  """Outcomes on four devices."""
  return [try_schedule(schedule, UNITS, 4, 8) for schedule in schedules]


def test_every_kind_has_a_line():
  outcomes = [try_schedule(kind, UNITS, 4, 8) for kind in EVERY if not kind.faults(4, 8)]
  assert len(outcomes) == len(EVERY)
  lines = outcome_table(outcomes, 'seconds').splitlines()
  assert len(lines) == len(EVERY) + 2
  assert lines[2].split() == (
    'GPipe() 2 min 12 s 27.3% 27.3%–27.3% 27.3% 72.7% 0.0% 8 32.00 KiB 16.00 KiB'.split()
  )


def test_figures_of_one():
  (dual,) = tried(DualPipe())
  assert dual.step == pytest.approx(26 * 4)
  assert dual.stage_spread == 0.0
  assert max(dual.device_bytes) == 2 * 4 * 4096 + 5 * 4 * 1024
  (late,) = tried(Asynchronous(steps=5))
  assert late.step == pytest.approx((5 * 8 + 3) / 5 * 12)
  uneven = try_schedule(OneFOneB(), (UNIT,) * 5, 2, 4)
  assert uneven.stage_spread == pytest.approx(0.4)


def test_stages_are_described():
  (outcome,) = tried(ZeroBubbleV())
  lines = describe_stages(outcome, NAMES).splitlines()[2:]
  assert len(lines) == 4
  assert 'embedding … layers/1 + layers/14 … layers/15' in lines[0]
  assert '1.000' in lines[3]


def test_the_fastest_that_fits_is_recommended():
  outcomes = tried(GPipe(), OneFOneB(), ZeroBubbleV(), DualPipe(), Asynchronous())
  name, reason = recommend(outcomes)
  assert name == 'ZeroBubbleV()'
  assert '1.29 times as fast as GPipe()' in reason
  needed = max(outcomes[1].device_bytes)
  assert recommend(outcomes[:2], needed)[0] == 'OneFOneB()'
  assert 'as fast, with more of them: GPipe()' in recommend(outcomes[:2])[1]
  with pytest.raises(ConfigError, match=r'no synchronous schedule fits into 1\.00 KiB'):
    recommend(outcomes, 1024)
  with pytest.raises(ConfigError, match='was tried'):
    recommend([])


def test_a_timeline_in_text():
  (outcome,) = tried(OneFOneB())
  lines = draw_text(outcome.timeline, 33).splitlines()
  assert lines[0] == '  0 ' + '0123......aa4bb5cc6dd7ee.ff.gg.hh'
  assert lines[3] == '  3 ' + '...0aa1bb2cc3dd4ee5ff6gg7hh......'
  (dual,) = tried(DualPipe())
  assert '#' in draw_text(dual.timeline)
  assert '-' in draw_text(dual.timeline)


def test_what_does_not_fit_is_refused():
  with pytest.raises(ConfigError, match='DualPipe: `microbatches` is 4'):
    try_schedule(DualPipe(), UNITS, 4, 4)
  with pytest.raises(ConfigError, match='17 units to cut'):
    try_schedule(GPipe(), UNITS, 18, 4)
