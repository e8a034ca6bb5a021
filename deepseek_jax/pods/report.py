"""A plan as text: memory, work, traffic, time, and a verdict in the last line."""

from collections.abc import Sequence

from deepseek_jax.core.describe import bytes_text, si, table
from deepseek_jax.pods.analytic import Rough
from deepseek_jax.pods.memory import CLASSES
from deepseek_jax.pods.plan import Part, Plan, Traffic
from deepseek_jax.pods.topology import Topology

GIB = 2**30

_ADVICE = {
  'parameters': 'more devices along `data`, or rules that cut more axes of the weights',
  'optimizer': '--config.optimizer.moments=bfloat16, or more devices along `data`',
  'buffers': 'fewer experts a device',
  'gradients': 'more devices along `data`',
  'activations': 'more microbatches, or --config.remat=SquareRoot()',
  'temporaries': 'more microbatches, or a smaller objective.chunk',
}


def describe(plan: Plan, rows: int = 12) -> str:
  """Returns the whole report of a plan.

  Args:
    plan: to describe.
    rows: of the longer tables.
  """
  parts = [_heading(plan), _memory(plan), _largest(plan, rows), _work(plan, rows)]
  if plan.traffic:
    parts.append(_traffic(plan, rows))
  parts += [_time(plan), _notes(plan), verdict(plan)]
  return '\n\n'.join(part for part in parts if part)


def describe_rough(rough: Rough, topology: Topology) -> str:
  """Returns a rough plan: memory, time by what it goes to, and whether it would fit."""
  chip = topology.chip
  memory = [(kind, bytes_text(size)) for kind, size in rough.memory.items() if size]
  memory += [('together', bytes_text(rough.total_bytes)), ('usable', bytes_text(chip.hbm_bytes))]
  mfu = rough.model_flops / (rough.step_seconds * chip.rate('bf16'))
  time = [(what, f'{seconds:.4g} s') for what, seconds in rough.seconds.items()]
  time += [('step', f'{rough.step_seconds:.4g} s'), ('model FLOPs utilisation', _percent(mfu))]
  sent = [(axes, what, bytes_text(size)) for (axes, what), size in rough.exchanged.items()]
  spare = (chip.hbm_bytes - rough.total_bytes) / GIB
  last = f'fits: {spare:.1f} GiB to spare' if spare >= 0 else f'does not fit: {-spare:.1f} GiB over'
  return '\n\n'.join((
    table(memory, ('memory of a device, roughly', '')),
    table(sent, ('sent along', 'what', 'bytes')),
    table(time, ('time of a step, roughly', '')),
    f'{last} (roughly: nothing was compiled)',
  ))  # fmt: skip


def verdict(plan: Plan) -> str:
  """Returns one line: whether it fits, by how much, and what else to try."""
  spare = plan.memory.spare_bytes
  if spare >= 0:
    return f'fits: {spare / GIB:.1f} GiB to spare'
  kind = blame(plan)
  worst = next((held for held in plan.memory.largest if held.kind == kind), None)
  reason = f'{kind} of {plan.memory.by_class[kind] / GIB:.1f} GiB'
  if worst is not None:
    reason += f', most of all {worst.shape} of {worst.module}'
  return f'does not fit: {-spare / GIB:.1f} GiB over because of {reason}; try {advice(plan)}'


def blame(plan: Plan) -> str:
  """Returns the class that most of the memory is taken by."""
  return max(plan.memory.by_class, key=lambda kind: plan.memory.by_class[kind])


def advice(plan: Plan) -> str:
  """Returns what may make a plan fit that does not."""
  return _ADVICE.get(blame(plan), 'more devices')


def _heading(plan: Plan) -> str:
  mesh = ' × '.join(f'{size} {axis}' for axis, size in plan.mesh.items() if size > 1) or '1 device'
  return (
    f'{plan.name}: {plan.kind} on {plan.topology}, {mesh}, {plan.tokens:,} tokens a step\n'
    f'{plan.command}'
  )


def _memory(plan: Plan) -> str:
  memory = plan.memory
  rows = [(kind, bytes_text(memory.by_class.get(kind, 0))) for kind in CLASSES]
  rows += [('peak, all together', bytes_text(memory.peak_bytes))]
  rows += [('usable', bytes_text(memory.usable_bytes))]
  return table([row for row in rows if row[1] != bytes_text(0)], ('memory of a device', ''))


def _largest(plan: Plan, rows: int) -> str:
  found = [
    (held.module, held.phase, held.kind, held.shape, bytes_text(held.bytes))
    for held in plan.memory.largest[:rows]
  ]
  return table(found, ('largest that are no arguments', 'made in', 'as', 'array', 'bytes'))


def _work(plan: Plan, rows: int) -> str:
  parts = sorted(plan.parts, key=lambda part: -part.seconds)
  total = sum(part.seconds for part in parts) or 1.0
  shown = [
    (
      p.module,
      p.phase,
      si(p.flops),
      bytes_text(p.bytes),
      f'{p.seconds:.4g}',
      _percent(p.seconds / total),
    )
    for p in parts[:rows]
  ]
  rest = parts[rows:]
  if rest:
    seconds = sum(p.seconds for p in rest)
    shown.append((
      f'{len(rest)} others', '', si(sum(p.flops for p in rest)),
      bytes_text(sum(p.bytes for p in rest)), f'{seconds:.4g}', _percent(seconds / total),
    ))  # fmt: skip
  return table(shown, ('work of a device in a step', 'pass', 'FLOPs', 'bytes', 'seconds', 'share'))


def _what(part: Part) -> tuple[str, ...]:
  return part.module, part.phase, si(part.flops), bytes_text(part.bytes)


def _traffic(plan: Plan, rows: int) -> str:
  items = sorted(plan.traffic, key=lambda item: -item.bytes)
  shown = [(t.axes, t.module, t.kind, bytes_text(t.bytes)) for t in items[:rows]]
  if items[rows:]:
    shown.append(('', f'{len(items) - rows} others', '', bytes_text(_sum(items[rows:]))))
  by_axes = {t.axes: 0.0 for t in items}
  for item in items:
    by_axes[item.axes] += item.bytes
  exchange, exposed = plan.time.exchange_seconds, plan.time.exposed_seconds
  sums = [
    (axes, bytes_text(sent), f'{exchange.get(axes, 0.0):.4g}', f'{exposed.get(axes, 0.0):.4g}')
    for axes, sent in sorted(by_axes.items(), key=lambda pair: -pair[1])
  ]
  return '\n\n'.join((
    table(sums, ('sent along', 'bytes', 'seconds', 'of them exposed')),
    table(shown, ('along', 'for', 'by', 'bytes')),
  ))  # fmt: skip


def _sum(items: Sequence[Traffic]) -> float:
  return sum(item.bytes for item in items)


def _time(plan: Plan) -> str:
  time = plan.time
  busy = ', '.join(f'{kind} {seconds:.4g}' for kind, seconds in time.busy_seconds.items())
  exposed = sum(time.exposed_seconds.values())
  rows = [
    ('step, at the rates of the device', f'{time.step_seconds:.4g} s'),
    ("step, by the compiler's cycles", f'{time.slow_seconds:.4g} s'),
    ('core busy, by what bounds it', f'{sum(time.busy_seconds.values()):.4g} s ({busy})'),
    ('waiting for exchanges', f'{exposed:.4g} s of {sum(time.exchange_seconds.values()):.4g} s'),
    ('tokens a second', f'{plan.tokens / time.step_seconds:,.0f}'),
    ('FLOPs a device, done', si(plan.flops)),
    ('FLOPs a device, of the model', si(plan.model_flops)),
    ('model FLOPs utilisation', f'{_percent(plan.mfu)} and {_percent(plan.slow_mfu)}'),
    ('bound by', time.bound),
  ]
  return table(rows, ('estimated time', ''))


def _notes(plan: Plan) -> str:
  return '\n'.join(
    f'{name}: {value}' for name, value in plan.facts.items() if value not in ([], '')
  )


def _percent(share: float) -> str:
  return f'{100 * share:.1f} %'
