"""Tables and pictures of what was found, from the committed results alone.

  python -m experiments.pipeline_schedules.plot

Draws two_processes (measured above predicted, the fewest microbatches; PNG and SVG) where there is
a results.jsonl, and v3_671b (three schedules on 16 stages, counted costs; PNG), beside this file.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.lab.timeline import draw_timelines
from deepseek_jax.pods.schedule.compare import EVERY, outcome_table, try_schedule
from deepseek_jax.pods.schedule.dual import DualPipe
from deepseek_jax.pods.schedule.kinds import (
  Asynchronous,
  GPipe,
  OneFOneB,
  ZeroBubbleH1,
  ZeroBubbleH2,
  ZeroBubbleV,
)
from deepseek_jax.pods.schedule.plan import Cost, Op, Plan
from deepseek_jax.pods.schedule.simulate import Event, Timeline, simulate
from experiments.pipeline_schedules.measure import report

FOLDER = pathlib.Path(__file__).parent
KINDS = {repr(kind): kind for kind in (GPipe(), OneFOneB(), ZeroBubbleH1(), ZeroBubbleH2())}


def read_rows() -> list[dict[str, Any]]:
  """Reads what the two processes did."""
  text = (FOLDER / 'results.jsonl').read_text(encoding='utf-8')
  return [json.loads(line) for line in text.splitlines()]


def timelines_of(row: Mapping[str, Any]) -> tuple[Timeline, Timeline]:
  """Returns what was measured in the median step, and what had been predicted."""
  costs = tuple(Cost(**cost) for cost in row['costs'])
  plan = KINDS[row['kind']].plan(len(costs), row['microbatches'], costs)
  predicted = simulate(plan, costs, row['transfer'])
  events, orders = [], []
  for device, mine in enumerate(row['events']):
    slots = [(Op(kind, device, microbatch),) for kind, microbatch, _, _ in mine]
    orders.append(tuple(slots))
    times = [(start, end) for _, _, start, end in mine]
    events += [Event(device, slot, *time) for slot, time in zip(slots, times, strict=True)]
  ran = Plan(routes=plan.routes, route_of=plan.route_of, orders=tuple(orders))
  measured = Timeline(plan=ran, costs=costs, transfer=row['transfer'], events=tuple(events))
  return measured, predicted


def draw_two_processes(rows: Sequence[Mapping[str, Any]]) -> None:
  """Draws measured above predicted, kind by kind, with the fewest microbatches."""
  fewest = min(row['microbatches'] for row in rows)
  timelines = {}
  for row in rows:
    if row['microbatches'] == fewest:
      measured, predicted = timelines_of(row)
      timelines[f'{row["kind"]}, measured'] = measured
      timelines[f'{row["kind"]}, predicted'] = predicted
  picture = draw_timelines(timelines)
  for kind in ('svg', 'png'):
    picture.savefig(FOLDER / f'two_processes.{kind}', dpi=110)


def read_costs(name: str) -> list[Cost]:
  """Reads costs that plan_pipeline.py wrote."""
  record = json.loads((FOLDER / f'{name}.json').read_text(encoding='utf-8'))
  return [Cost(**cost) for cost in record['costs']]


def draw_v3() -> None:
  """Draws and prints three schedules of DeepSeek-V3 on 16 stages, with and without exchanges."""
  for name in ('v3_671b', 'v3_671b_exchange'):
    costs = read_costs(name)
    kinds = (OneFOneB(), ZeroBubbleV(), DualPipe())
    outcomes = [try_schedule(kind, costs, 16, 32) for kind in kinds]
    print(f'\n{name}\n{outcome_table(outcomes, "FLOPs")}')
    picture = draw_timelines({one.name: one.timeline for one in outcomes}, 'FLOPs')
    picture.savefig(FOLDER / f'{name}.png', dpi=110)


def print_p2() -> None:
  """Prints every schedule on the measured costs of P2, and runs without a flush of some lengths."""
  costs = read_costs('p2')
  kinds = [kind for kind in EVERY if not kind.faults(8, 13) and kind.chunks(8) <= len(costs)]
  kinds += [Asynchronous(steps=steps) for steps in (2, 4, 8, 64)]
  outcomes = [try_schedule(kind, costs, 8, 13) for kind in kinds]
  print(f'\np2\n{outcome_table(outcomes, "seconds")}')


def main() -> None:
  """Prints the tables and draws the pictures."""
  if (FOLDER / 'results.jsonl').is_file():
    rows = read_rows()
    print(report(rows))
    draw_two_processes(rows)
  else:
    print('no results.jsonl: the two processes have not been measured')
  draw_v3()
  print_p2()


if __name__ == '__main__':
  main()
