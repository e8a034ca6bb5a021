"""The plan of a training step: compiled for a slice that is not here, then read."""

import math
from collections.abc import Sequence
from typing import Any

from deepseek_jax.core.precision import BFloat16
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.pods import hlo
from deepseek_jax.pods.chips import Chip
from deepseek_jax.pods.estimate import Tally, estimate, machine_of, work_seconds
from deepseek_jax.pods.kernels import KernelModel
from deepseek_jax.pods.memory import (
  bytes_by_class,
  held_at_peak,
  live_at_peak,
  sum_by_class,
  weights_by_shape,
)
from deepseek_jax.pods.plan import Memory, Part, Plan, Time, Traffic
from deepseek_jax.pods.topology import Build, Topology, compile_program
from deepseek_jax.pods.work import Work
from deepseek_jax.train.experiment import Experiment, resolved
from deepseek_jax.train.step import Program, build_program
from deepseek_jax.train.summary import experiment_weights, step_flops

MOST_HELD = 24
"""Arrays that a plan lists."""


def plan_training(
  experiment: Experiment, topology: Topology, devices: Sequence[Any], command: str = ''
) -> Plan:
  """Compiles a whole training step for a slice, and says what one of its devices holds and does.

  Args:
    experiment: the run; `Fastest` precision is bfloat16 here.
    topology: the slice.
    devices: of the slice, from `topology.find_devices`.
    command: that repeats the plan.

  Raises:
    ConfigError: the run does not fit together or onto the mesh.
  """
  program = build_program(resolved(experiment, BFloat16()), list(devices))
  state, batch = program.abstract_state, program.abstract_batch()
  build = compile_program(lambda: program.step.lower(state, batch), for_tpu=True)
  return read_training(program, topology, build, command)


def read_training(program: Program, topology: Topology, build: Build, command: str = '') -> Plan:
  """Makes the plan of a training step that is compiled.

  Args:
    program: the run.
    topology: the slice.
    build: what the compiler made.
    command: that repeats the plan.
  """
  experiment, chip = program.experiment, topology.chip
  module = hlo.parse(build.text)
  machine = machine_of(topology, dict(program.mesh.shape), program.mesh.devices.reshape(-1))
  kernels = KernelModel(rows_filled=rows_filled(experiment, dict(machine.sizes)))
  tally = estimate(module, machine, kernels)
  state = program.abstract_state
  weights = weights_by_shape(state.params)
  devices = len(machine.coords)
  flops = float(step_flops(experiment, experiment_weights(program))[-1]) / devices
  return assemble(
    tally,
    Memory(
      **memory_of(module, build, weights, bytes_by_class(state)), usable_bytes=int(chip.hbm_bytes)
    ),
    chip,
    estimate(module, machine, kernels, cycles=True).total_seconds,
    name=experiment.name,
    kind='train',
    command=command,
    topology=topology.name,
    mesh=dict(machine.sizes),
    tokens=experiment.data.batch_size * experiment.data.length,
    model_flops=flops,
    facts=facts_of(build, tally),
  )


def memory_of(
  module: hlo.Module, build: Build, weights: dict[tuple[int, ...], str], counted: dict[str, int]
) -> dict[str, Any]:
  """Returns classes, peak and largest arrays; arguments at least as counted from their shapes.

  Args:
    module: the program.
    build: what the compiler made.
    weights: addresses of parameters by shape.
    counted: bytes of arguments by class.
  """
  held = held_at_peak(module, live_at_peak(build.live_ranges), weights)
  by_class = sum_by_class(held) if held else {}
  # What is exact from shapes; the compiler's figures add padding.
  by_class |= {kind: max(by_class.get(kind, 0), size) for kind, size in counted.items()}
  largest = tuple(h for h in held if h.phase)[:MOST_HELD]
  return {'by_class': by_class, 'peak_bytes': build.peak_bytes, 'largest': largest}


def assemble(tally: Tally, memory: Memory, chip: Chip, slow_seconds: float, **rest: Any) -> Plan:
  """Puts a plan together from what was read of a program.

  Args:
    tally: from `estimate`.
    memory: of a device.
    chip: the device.
    slow_seconds: of a step, by the compiler's cycles.
    **rest: the other fields of `Plan`.
  """
  parts = tuple(
    Part(
      module=module,
      phase=phase,
      flops=work.flops,
      bytes=work.bytes,
      seconds=tally.seconds.get((module, phase), 0.0),
    )
    for (module, phase), work in tally.work.items()
  )
  traffic = tuple(
    Traffic(axes=axes, module=module, kind=kind, bytes=sent)
    for (axes, module, kind), sent in tally.exchanged.items()
  )
  return Plan(
    memory=memory,
    parts=parts,
    traffic=traffic,
    time=time_of(tally, chip, slow_seconds),
    peak_flops=chip.rate('bf16'),
    **rest,
  )


def time_of(tally: Tally, chip: Chip, slow_seconds: float) -> Time:
  """Says what the time of a step is made of, and what bounds it."""
  busy = {'matrix': 0.0, 'memory': 0.0, 'vector': 0.0}
  for key, work in tally.work.items():
    busy[bound_of(work, chip)] += tally.seconds.get(key, 0.0)
  busy['memory'] += tally.copy_seconds
  exposed = dict(tally.exposed_seconds)
  candidates = {
    'matrix products': busy['matrix'],
    'memory bandwidth': busy['memory'],
    'vector operations': busy['vector'],
    **{f'exchanges along {axes}': seconds for axes, seconds in exposed.items()},
  }
  bound = max(candidates, key=lambda name: candidates[name])
  share = candidates[bound] / tally.total_seconds if tally.total_seconds else 0.0
  return Time(
    step_seconds=tally.total_seconds,
    slow_seconds=slow_seconds,
    busy_seconds=busy,
    exchange_seconds=dict(tally.exchange_seconds),
    exposed_seconds=exposed,
    bound=f'{bound}, {100 * share:.0f} % of the step',
  )


def bound_of(work: Work, chip: Chip) -> str:
  """Returns what takes longest of some work: 'matrix', 'memory' or 'vector'."""
  alone = {
    'matrix': Work(work.matrix_flops),
    'memory': Work(bytes=work.bytes),
    'vector': Work(other_flops=work.other_flops),
  }
  return max(alone, key=lambda kind: work_seconds(alone[kind], chip))


def facts_of(build: Build, tally: Tally) -> dict[str, Any]:
  """Returns what else is worth keeping of a compilation."""
  return {
    'seconds to trace and lower': round(build.lower_seconds, 1),
    'seconds to compile': round(build.compile_seconds, 1),
    "the compiler's FLOPs, loops once": build.cost.get('flops', 0.0),
    'FLOPs in kernels': tally.all_work.kernel_flops,
    'loops of unknown trips, counted once': sorted(set(tally.unknown_loops)),
    'kernels of unknown cost': sorted(set(tally.unknown_kernels)),
  }


def rows_filled(experiment: Experiment, sizes: dict[str, int]) -> float:
  """Returns which share of the rows of the experts' products are somebody's, loads being even."""
  kinds = [block.feed_forward for block in experiment.model.layers()]
  shares = [
    1 / (min(moe.dispatch.bound or math.inf, sizes['expert']))
    for moe in kinds
    if isinstance(moe, MoE) and isinstance(moe.dispatch, AllToAll)
  ]
  return min(shares, default=1.0)
