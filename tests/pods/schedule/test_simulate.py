"""Simulated schedules: closed forms, a slow reference, and a checker that can fail."""

import dataclasses
import random

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.pods.schedule.check import check_timeline
from deepseek_jax.pods.schedule.dual import DualPipe
from deepseek_jax.pods.schedule.greedy import Searched
from deepseek_jax.pods.schedule.kinds import (
  Asynchronous,
  GPipe,
  Interleaved,
  OneFOneB,
  ZeroBubbleH1,
  ZeroBubbleH2,
  ZeroBubbleV,
)
from deepseek_jax.pods.schedule.plan import Cost, Op, Plan
from deepseek_jax.pods.schedule.simulate import simulate

KINDS = (
  GPipe(),
  OneFOneB(),
  Asynchronous(steps=2),
  Interleaved(),
  Interleaved(chunks_per_stage=3),
  ZeroBubbleH1(),
  ZeroBubbleH2(),
  ZeroBubbleV(),
  Searched(memory=1.5),
  DualPipe(),
)


def equal(kind, stages, forward=1.0, backward=1.0, weight=1.0, exchange=0.0):
  """Costs of equal chunks; all of a stage's together take `forward`, `backward`, `weight`."""
  share = stages / kind.chunks(stages)
  cost = Cost(
    forward=forward * share,
    backward_input=backward * share,
    backward_weight=weight * share,
    backward=(backward + weight) * share,
    forward_exchange=exchange,
    backward_exchange=exchange,
    kept_bytes=3.0 * share,
    left_bytes=2.0 * share,
    parameter_bytes=7.0 * share,
  )
  return (cost,) * kind.chunks(stages)


def run(kind, stages, microbatches, costs=None, transfer=0.0):
  """Plans, simulates and checks."""
  costs = equal(kind, stages) if costs is None else costs
  timeline = simulate(kind.plan(stages, microbatches, costs), costs, transfer)
  check_timeline(timeline)
  return timeline


def uneven(kind, stages, chance, exchange=1.0):
  """Costs that have nothing in common."""

  def one():
    forward, backward, weight = (chance.choice([0.0, chance.uniform(0.1, 3)]) for _ in range(3))
    return Cost(
      forward=forward,
      backward_input=backward,
      backward_weight=weight,
      backward=backward + weight * chance.random(),
      forward_exchange=exchange * chance.random(),
      backward_exchange=exchange * chance.random(),
      kept_bytes=chance.random() + 1,
      left_bytes=chance.random(),
    )

  return tuple(one() for _ in range(kind.chunks(stages)))


def longest_path(plan, costs, transfer):
  """End of every slot: as late as any chain of work before it asks, found by repetition."""
  parts = {'F': 'F', 'B': 'B', 'W': 'W', 'BW': 'BW'}
  slots = [(d, i, slot) for d, order in enumerate(plan.orders) for i, slot in enumerate(order)]
  where = {}
  for d, i, slot in slots:
    for op in slot:
      where[(parts[op.kind], op.chunk, op.microbatch)] = (d, i)
      if op.kind == 'BW':
        where['B', op.chunk, op.microbatch] = (d, i)
  before = {}
  for d, i, slot in slots:
    edges = [(d, i - 1, 0.0)] if i else []
    for kind, chunk, m in slot:
      need = []
      if kind == 'F' and chunk:
        need = [('F', chunk - 1, m)]
      elif kind in ('B', 'BW'):
        need = [('F', chunk, m)] + [('B', chunk + 1, m)] * (chunk + 1 < len(costs))
      elif kind == 'W':
        need = [('B', chunk, m)]
      for key in need:
        e, j = where[key]
        edges.append((e, j, transfer if e != d else 0.0))
    before[d, i] = edges

  def lasts(slot):
    compute = [
      {'F': c.forward, 'B': c.backward_input, 'W': c.backward_weight, 'BW': c.backward}[op.kind]
      for op in slot
      for c in [costs[op.chunk]]
    ]
    travel = [
      {'F': costs[op.chunk].forward_exchange, 'W': 0.0}.get(
        op.kind, costs[op.chunk].backward_exchange
      )
      for op in slot
    ]
    return max(sum(compute), sum(travel)) if len(slot) > 1 else compute[0] + travel[0]

  ends = {(d, i): 0.0 for d, i, _ in slots}
  for _ in range(len(slots) + 1):
    changed = False
    for d, i, slot in slots:
      start = max([0.0] + [ends[e, j] + late for e, j, late in before[d, i]])
      if start + lasts(slot) > ends[d, i] + 1e-12:
        ends[d, i], changed = start + lasts(slot), True
    if not changed:
      return ends
  raise AssertionError('there is a cycle')


@pytest.mark.parametrize(('p', 'm'), [(1, 3), (2, 4), (3, 7), (4, 8), (8, 13)])
def test_gpipe_and_1f1b_wait_alike(p, m):
  gpipe, one = run(GPipe(), p, m), run(OneFOneB(), p, m)
  for timeline in (gpipe, one):
    assert timeline.bubble == pytest.approx((p - 1) / (m + p - 1))
    assert timeline.makespan == pytest.approx(3 * (m + p - 1))
    assert timeline.bubbles == pytest.approx([timeline.bubble] * p)
  assert gpipe.peak_microbatches() == pytest.approx([m] * p)
  assert one.peak_microbatches() == pytest.approx([min(m, p - s) for s in range(p)])
  assert gpipe.peak_bytes() == pytest.approx([3 * m] * p)
  assert run(Asynchronous(steps=3), p, m).bubble == pytest.approx((p - 1) / (3 * m + p - 1))


@pytest.mark.parametrize(('p', 'm', 'v'), [(2, 4, 2), (4, 8, 2), (4, 4, 3), (3, 9, 4)])
def test_interleaving_divides_the_waiting(p, m, v):
  timeline = run(Interleaved(chunks_per_stage=v), p, m)
  assert timeline.bubble == pytest.approx((p - 1) / (v * m + p - 1))
  assert timeline.plan.device(Op('F', p, 0)) == 0


@pytest.mark.parametrize(('p', 'm'), [(2, 4), (3, 9), (4, 8), (8, 16)])
@pytest.mark.parametrize('weight', [1.0, 0.75])
def test_putting_weights_off_fills_the_waiting(p, m, weight):
  costs = equal(ZeroBubbleH1(), p, weight=weight)
  one = run(ZeroBubbleH1(), p, m, costs)
  waits = (p - 1) * (2 - weight)
  assert one.makespan - m * (2 + weight) == pytest.approx(waits)
  assert one.peak_microbatches() == pytest.approx([p] * p)
  two = run(ZeroBubbleH2(), p, m, costs)
  assert two.span - m * (2 + weight) == pytest.approx((p - 1) * (2 - 2 * weight))
  assert max(two.peak_microbatches()) <= 2 * p - 1


@pytest.mark.parametrize(('p', 'm'), [(2, 4), (4, 8), (8, 16)])
def test_a_v_waits_for_nothing(p, m):
  timeline = run(ZeroBubbleV(), p, m)
  assert timeline.span_bubble == pytest.approx(0.0)
  assert max(timeline.peak_microbatches()) == pytest.approx(p)
  assert timeline.plan.held(0) == (0, 2 * p - 1)
  # Half a forward pass later on every device: the last cannot begin before.
  assert timeline.bubble * timeline.makespan == pytest.approx((p - 1) / 2)


@pytest.mark.parametrize(('p', 'm'), [(2, 4), (4, 8), (4, 10), (8, 16)])
def test_dualpipe(p, m):
  timeline = run(DualPipe(), p, m)
  pair, backward, weight = 3.0, 2.0, 1.0
  waits = (p / 2 - 1) * (pair + backward - 3 * weight)
  assert timeline.bubble * timeline.makespan == pytest.approx(waits)
  assert timeline.peak_microbatches() == pytest.approx([p + 1] * p)
  assert timeline.parameter_bytes() == pytest.approx([14.0] * p)


def test_an_overlapping_pair_hides_its_exchanges():
  """As much exchange as forward compute: a pair of (1, 2) and (1, 1) takes 3, and 5 alone."""
  costs = equal(DualPipe(), 4, exchange=1.0)
  dual, one = run(DualPipe(), 4, 8, costs), run(OneFOneB(), 4, 8, costs)
  assert one.makespan == pytest.approx(5 * (8 + 3))
  assert dual.makespan < 0.7 * one.makespan
  pairs = [event for event in dual.events if len(event.slot) == 2]
  assert pairs
  assert {round(event.end - event.start, 6) for event in pairs} == {3.0}
  assert dual.compute_share == pytest.approx(24 / dual.makespan)
  # Exchange that is longer than compute is what a pair then takes.
  slow = run(DualPipe(), 4, 8, equal(DualPipe(), 4, exchange=2.0))
  assert any(event.end - event.start == pytest.approx(4.0) for event in slow.events)


@pytest.mark.parametrize('kind', KINDS, ids=repr)
@pytest.mark.parametrize('seed', range(3))
def test_uneven_costs_against_the_longest_path(kind, seed):
  chance = random.Random(seed)
  stages = chance.choice([2, 4])
  microbatches = 2 * stages * chance.randint(1, 2)
  costs = uneven(kind, stages, chance)
  transfer = chance.choice([0.0, 0.3])
  timeline = run(kind, stages, microbatches, costs, transfer)
  ends = longest_path(timeline.plan, costs, transfer)
  found = {}
  for device, mine in enumerate(timeline.by_device()):
    assert tuple(event.slot for event in mine) == timeline.plan.orders[device]
    found |= {(device, i): event.end for i, event in enumerate(mine)}
  assert found == pytest.approx(ends)
  assert timeline.makespan == pytest.approx(max(ends.values()))


@pytest.mark.parametrize('seed', range(3))
def test_a_search_is_never_worse_than_what_it_starts_from(seed):
  chance = random.Random(seed)
  costs = uneven(ZeroBubbleV(), 3, chance)
  known, found = run(ZeroBubbleV(), 3, 5, costs), run(Searched(), 3, 5, costs)
  assert found.makespan <= known.makespan
  assert max(found.peak_microbatches()) <= 3
  assert run(Searched(memory=2), 3, 5, costs).makespan <= found.makespan + 1e-9


@pytest.mark.parametrize(
  ('kind', 'stages', 'microbatches', 'fault'),
  [
    (Interleaved(), 4, 6, 'Interleaved: `microbatches` is 6; expected a multiple of 4 stages'),
    (DualPipe(), 3, 8, '`stages` is 3; expected an even number'),
    (DualPipe(), 4, 7, '`microbatches` is 7; expected an even number, 8 or more'),
    (GPipe(), 0, 4, 'GPipe: `stages` is 0; expected 1 or more'),
    (ZeroBubbleV(), 2, 0, '`microbatches` is 0; expected 1 or more'),
  ],
)
def test_numbers_that_do_not_fit(kind, stages, microbatches, fault):
  with pytest.raises(ConfigError, match=fault):
    kind.plan(stages, microbatches, ())


@pytest.mark.parametrize(
  ('make', 'fault'),
  [
    (lambda: Interleaved(chunks_per_stage=0), '`chunks_per_stage` is 0'),
    (lambda: Asynchronous(steps=0), '`steps` is 0'),
    (lambda: Searched(memory=0.5), '`memory` is 0.5'),
    (lambda: simulate(GPipe().plan(2, 2), ()), 'found 0 costs'),
  ],
)
def test_bad_kinds(make, fault):
  with pytest.raises(ConfigError, match=fault):
    make()


def test_orders_that_wait_for_each_other():
  plan = Plan(
    routes=((0, 1),),
    route_of=(0,),
    orders=(
      ((Op('F', 0, 0),), (Op('BW', 0, 0),)),
      ((Op('BW', 1, 0),), (Op('F', 1, 0),)),
    ),
  )
  with pytest.raises(ConfigError, match='device 1 never gets to Op'):
    simulate(plan, equal(GPipe(), 2))


def swap(timeline, at, **changes):
  """The timeline with one event changed."""
  events = list(timeline.events)
  events[at] = dataclasses.replace(events[at], **changes)
  return dataclasses.replace(timeline, events=tuple(events))


@pytest.mark.parametrize(
  ('spoil', 'fault'),
  [
    (lambda t: swap(t, 3, slot=(Op('F', 0, 0),)), 'was done 2 times'),
    (lambda t: dataclasses.replace(t, events=t.events[:-1]), 'was done 0 times'),
    (lambda t: swap(t, 0, device=1), 'ran on device 1, not 0'),
    (lambda t: swap(t, 0, end=0.5), 'took 0.5, not 1'),
    (lambda t: swap(t, len(t.events) - 1, start=6.5, end=7.5), 'two slots at once'),
    (lambda t: dataclasses.replace(t, transfer=0.25), 'began before'),
    (lambda t: _Boastful(**vars(t)), 'remembers'),
  ],
)
def test_a_false_timeline_is_noticed(spoil, fault):
  timeline = run(ZeroBubbleH1(), 3, 4)
  with pytest.raises(ConfigError, match=fault):
    check_timeline(spoil(timeline))


class _Boastful(type(run(GPipe(), 1, 1))):
  """Claims to remember nothing."""

  def peak_microbatches(self):
    return (0.0,) * self.plan.stages
