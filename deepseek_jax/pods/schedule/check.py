"""Says whether a timeline can be true; shares no code with what made it."""

from collections import defaultdict

from deepseek_jax.core.config import ConfigError
from deepseek_jax.pods.schedule.simulate import Timeline

PARTS = {'F': ('F',), 'B': ('B',), 'W': ('W',), 'BW': ('B', 'W')}


def check_timeline(timeline: Timeline, tolerance: float = 1e-9) -> None:
  """Refuses a timeline that no pipeline could have run, or that forgets work.

  Every microbatch goes once through every chunk, forward, backward and for its weights; each piece
  lies on the device that holds the chunk, lasts as long as its cost, and begins after what it
  needs has ended (and has travelled, where it comes from another device); a device does one slot
  at a time; and the memory that the timeline claims is the memory that its events need.

  Args:
    timeline: what a simulator claims.
    tolerance: of times, as a share of the makespan.

  Raises:
    ConfigError: it cannot be; every fault is listed.
  """
  slack = tolerance * max(event.end for event in timeline.events)
  faults = _work_faults(timeline)
  if not faults:
    faults = _time_faults(timeline, slack) + _order_faults(timeline, slack)
    faults += _memory_faults(timeline)
  if faults:
    raise ConfigError(faults)


def _placed(timeline: Timeline):
  """Yields (part, chunk, microbatch, event) of every piece of work; whole backward ones twice."""
  for event in timeline.events:
    for kind, chunk, microbatch in event.slot:
      for part in PARTS[kind]:
        yield part, chunk, microbatch, event


def _work_faults(timeline: Timeline) -> list[str]:
  """Everything is done once, where it belongs."""
  plan = timeline.plan
  count: dict[tuple, int] = defaultdict(int)
  faults = []
  for part, chunk, microbatch, event in _placed(timeline):
    count[part, chunk, microbatch] += 1
    home = plan.routes[plan.route_of[microbatch]][chunk]
    if event.device != home:
      faults.append(
        f'{part} of chunk {chunk}, microbatch {microbatch} ran on device {event.device}, not {home}'
      )
  for part in 'FBW':
    for chunk in range(len(timeline.costs)):
      for microbatch in range(len(plan.route_of)):
        times = count.pop((part, chunk, microbatch), 0)
        if times != 1:
          faults.append(f'{part} of chunk {chunk}, microbatch {microbatch} was done {times} times')
  return faults + [f'{work} belongs to no chunk or microbatch' for work in count]


def _time_faults(timeline: Timeline, slack: float) -> list[str]:
  """Slots last as long as they cost, and devices do one at a time."""
  faults = []
  last: dict[int, float] = defaultdict(float)
  for event in sorted(timeline.events, key=lambda event: event.start):
    if event.start < last[event.device] - slack:
      faults.append(f'device {event.device} does two slots at once at {event.start:g}')
    last[event.device] = event.end
    compute = exchange = 0.0
    for kind, chunk, _ in event.slot:
      cost = timeline.costs[chunk]
      compute += {
        'F': cost.forward,
        'B': cost.backward_input,
        'W': cost.backward_weight,
        'BW': cost.backward,
      }[kind]
      exchange += {'F': cost.forward_exchange, 'W': 0.0}.get(kind, cost.backward_exchange)
    expected = max(compute, exchange) if len(event.slot) > 1 else compute + exchange
    if abs(event.end - event.start - expected) > slack:
      faults.append(f'{event.slot} took {event.end - event.start:g}, not {expected:g}')
  return faults


def _order_faults(timeline: Timeline, slack: float) -> list[str]:
  """Nothing begins before what it needs is there."""
  at = {(part, chunk, m): event for part, chunk, m, event in _placed(timeline)}
  faults = []
  for (part, chunk, m), event in at.items():
    before = {
      'F': [('F', chunk - 1, m)] if chunk else [],
      'B': [('F', chunk, m)] + [('B', chunk + 1, m)] * (chunk + 1 < len(timeline.costs)),
      'W': [('B', chunk, m)],
    }[part]
    for need in before:
      source = at[need]
      if source is event and part == 'W':
        continue
      travel = timeline.transfer if source.device != event.device else 0.0
      if source.end + travel > event.start + slack:
        faults.append(f'{part} of chunk {chunk}, microbatch {m} began before {need} was there')
  return faults


def _memory_faults(timeline: Timeline) -> list[str]:
  """Counts, at the start of every slot, what is alive; compares the most with what is claimed."""
  plan = timeline.plan
  at = {(part, chunk, m): event for part, chunk, m, event in _placed(timeline)}
  share = len(plan.orders) / len(timeline.costs)
  faults = []
  for device in range(len(plan.orders)):
    mine = [
      (at['F', c, m].start, at['B', c, m].end, at['W', c, m].end, timeline.costs[c])
      for part, c, m, event in _placed(timeline)
      if part == 'F' and event.device == device
    ]
    most, most_bytes = 0.0, 0.0
    for event in timeline.events:
      if event.device == device:
        # What ended before this slot began is gone; what it makes is there.
        now = event.start
        alive = [one for one in mine if one[0] <= now < one[2]]
        most = max(most, share * len(alive))
        held = (c.kept_bytes if now < middle else c.left_bytes for _, middle, _, c in alive)
        most_bytes = max(most_bytes, sum(held))
    claimed = timeline.peak_microbatches()[device]
    if abs(most - claimed) > 1e-6:
      faults.append(f'device {device} remembers {most:g} microbatches, not {claimed:g}')
    claimed = timeline.peak_bytes()[device]
    if abs(most_bytes - claimed) > 1e-6 * max(most_bytes, 1.0):
      faults.append(f'device {device} remembers {most_bytes:g} bytes, not {claimed:g}')
  return faults
