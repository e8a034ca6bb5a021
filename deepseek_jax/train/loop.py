"""The loop of a run: restore, then step, log, evaluate, sample and save until it is done."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.data.captions import CaptionData
from deepseek_jax.data.media.rows import MediaData
from deepseek_jax.data.pipeline import TextData
from deepseek_jax.data.recall import RecallData
from deepseek_jax.sharding.agreement import from_first, gather, in_turn
from deepseek_jax.sharding.host_rows import put_whole
from deepseek_jax.train import report
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.display import Display
from deepseek_jax.train.evaluate import Evaluation, bits_per_byte, evaluate
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.faults import FaultLog
from deepseek_jax.train.initialise import Origin, open_origin
from deepseek_jax.train.interrupt import Stop
from deepseek_jax.train.link import Link, agreed, open_link, with_interval
from deepseek_jax.train.metrics import MetricWriter
from deepseek_jax.train.placement import expert_devices, rebalance
from deepseek_jax.train.restart import Restart, find_restart
from deepseek_jax.train.saver import Saver
from deepseek_jax.train.snapshot import Snapshots, make_snapshots
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import Metrics, Program, build_program
from deepseek_jax.train.summary import experiment_weights, step_flops
from deepseek_jax.train.team import Team, make_team
from deepseek_jax.train.throughput import Clock, measure_matmul_peak, peak_memory_bytes
from deepseek_jax.train.workdir import Workdir

Sampler = Callable[[Any, Any], list[dict[str, Any]]]
"""`(params, buffers) -> rows`: continuations of the prompts; handed in, since generation is not
training's business."""


class Outcome(NamedTuple):
  """How a run ended.

  Attributes:
    step: finished steps.
    stopped_by: the signal that ended it early, or None.
    evaluation: held-out figures after the last step, or None where it ended early.
  """

  step: int
  stopped_by: str | None
  evaluation: Evaluation | None


@dataclasses.dataclass(frozen=True)
class _Run:
  """What the parts of the loop share."""

  experiment: Experiment
  program: Program
  data: TextData | CaptionData | RecallData | MediaData
  workdir: Workdir
  writer: MetricWriter
  faults: FaultLog
  saver: Saver
  team: Team
  snapshots: Snapshots | None
  clock: Clock
  link: Link | None
  step_flops: np.ndarray
  peak_flops: float
  sample: Sampler | None
  started: float


def train(
  experiment: Experiment,
  workdir: Workdir,
  cache_dir: pathlib.Path,
  display: Display,
  sample: Callable[[Program, Any], Sampler] | None = None,
) -> Outcome:
  """Trains until the last step, or until a signal says to stop; goes on where an earlier run was.

  Args:
    experiment: what to run; its precision is one that computes.
    workdir: the folder of the run, with its config written.
    cache_dir: folder for tokens and pack plans.
    display: what the terminal shows.
    sample: makes the function that continues the prompts, or None.

  Raises:
    ConfigError: the experiment, its text or its checkpoints do not fit.
    DiskFullError: there is no room for the run's first state, or none for several in a row.
    StoppedEarlyError: a signal came before the first new step; there was nothing to save.
    SkippedStepsError: the guard skipped too many steps in a row; the last good state is saved.
    NoExpertsError: a layer has no expert left in use; the state is saved.
  """
  program = build_program(experiment)
  checkpoints = Checkpoints(workdir.checkpoints, experiment.cadence.keep, 'bits_per_byte')
  writer = workdir.writer(display)
  team = make_team(display, workdir.rows(workdir.faults))
  with contextlib.ExitStack() as stack:
    stack.enter_context(writer)
    stack.enter_context(checkpoints)
    stop = stack.enter_context(Stop())
    display.message('reading the text …')
    tokenized = lambda: in_turn(lambda: experiment.data.prepare(cache_dir))  # noqa: E731
    data = team.in_background(tokenized, stop)
    snapshots = make_snapshots(experiment.cadence.snapshot, workdir.path)
    restart = find_restart(program, workdir, checkpoints, snapshots, display)
    start = restart.step
    rewind(workdir, writer, start)
    if start >= experiment.train_steps:
      display.message(f'nothing to do: {start} of {experiment.train_steps} steps are done')
      return Outcome(start, None, None)
    saver = Saver(experiment, workdir, checkpoints, display)
    from_first(lambda: saver.check_room(program.abstract_state))
    display.message(restart.words)
    origin = None if start else open_origin(program)
    if origin is not None:
      from_first(functools.partial(origin.write, workdir.init_from))
      display.message(origin.describe())
    prepare = lambda: _prepare(program, restart, origin)  # noqa: E731
    step, state, peak = team.in_background(prepare, stop)
    run = _Run(
      experiment=experiment,
      program=program,
      data=data,
      workdir=workdir,
      writer=writer,
      faults=FaultLog(
        workdir.rows(workdir.faults),
        data.train,
        display,
        None if experiment.guard is None else experiment.guard.stop_after,
        experiment.segments,
        gather,
      ),
      saver=saver,
      team=team,
      snapshots=snapshots,
      clock=Clock(experiment.data.batch_size * experiment.data.length),
      link=open_link(experiment),
      step_flops=step_flops(experiment, experiment_weights(program)),
      peak_flops=peak * len(program.mesh.devices.flat),
      sample=None if sample is None else sample(program, data),
      started=time.perf_counter(),
    )
    return _loop(run, step, state, start, stop)


def rewind(workdir: Workdir, writer: MetricWriter, step: int) -> None:
  """Drops log rows of steps that the checkpoint does not know of: they will be run again."""
  writer.truncate(step)
  for path in (workdir.evaluations, workdir.samples, workdir.faults, workdir.placements):
    workdir.rows(path).truncate(step)


def _prepare(
  program: Program, restart: Restart, origin: Origin | None
) -> tuple[Callable[..., Any], TrainState, float]:
  """Compiles the step, and makes or restores the state."""
  compiled = program.step.compile(program.abstract_state, program.abstract_batch())
  # What follows talks over the devices, which do not wait as long as a compilation may take.
  gather(None)
  if restart.restore is not None:
    state = restart.restore()
  else:
    state = program.init(jax.random.key(program.experiment.seed))
    state = state if origin is None else origin.load(program, state)
  dtype = program.experiment.precision.compute
  peak = measure_matmul_peak(dtype, seconds=0.5)
  return compiled, state, peak


def _loop(
  run: _Run, step: Callable[..., Any], state: TrainState, start: int, stop: Stop
) -> Outcome:
  """Dispatches one step ahead of the one whose results are read."""
  total, cadence = run.experiment.train_steps, run.experiment.cadence
  batches = run.data.train_batches(start, run.program.own_rows)
  pending: _Pending | None = None
  evaluation: Evaluation | None = None
  for done in range(start + 1, total + 1):
    begin = time.perf_counter()
    rows = next(batches)
    batch = run.program.put(rows)
    host_seconds = time.perf_counter() - begin
    state, metrics = step(state, batch)
    metrics['host_seconds'] = host_seconds
    _finish(run, pending)
    pending = _Pending(done, metrics, np.asarray(rows.documents))
    state = _adapt(run, state, done)
    if run.snapshots is not None and _due(done, run.snapshots.every):
      run.snapshots.save(done, state)
    placement = run.experiment.placement
    if placement is not None and _due(done, placement.every):
      _finish(run, pending)
      pending = None
      state = _place(run, state, done)
    last = done == total
    signal = run.team.stopping(done, stop, state.step, host_seconds)
    halt = signal is not None or run.faults.exhausted
    evaluating = last or _due(done, cadence.evaluate)
    saving = last or halt or _due(done, cadence.save)
    if not (evaluating or saving or _due(done, cadence.sample)):
      continue
    _finish(run, pending)
    pending = None
    if run.faults.exhausted:
      _stop_skipping(run, state, done)
    with run.clock.pause():
      try:
        evaluation = None
        if evaluating and not halt:
          evaluation = _evaluate(run, state, done, last)
        if (last or _due(done, cadence.sample)) and not halt:
          _sample(run, state, done)
      finally:
        # What was trained is saved even where evaluating it fails.
        if saving:
          bits = None if evaluation is None else evaluation.bits_per_byte
          run.saver.save(done, state, bits)
    if halt and not last:
      run.saver.finish()
      run.writer.display.message(f'{signal}: saved step {done} of {total}')
      return Outcome(done, signal, None)
  run.saver.finish()
  if run.snapshots is not None:
    run.snapshots.clear()
  return Outcome(total, None, evaluation)


def _adapt(run: _Run, state: TrainState, step: int) -> TrainState:
  """Lets replicas meet more or less often, where that is by measured seconds."""
  measured = None if run.link is None else run.link.take()
  if measured is None:
    return state
  measured = agreed(measured)
  run.writer.display.message(f'step {step}  {measured}')
  return with_interval(state, measured.steps)


def _place(run: _Run, state: TrainState, step: int) -> TrainState:
  """Places the experts anew; a checkpoint of the same step has them so."""
  experiment, display = run.experiment, run.writer.display
  assert experiment.placement is not None
  devices = expert_devices(experiment.rules, dict(run.program.mesh.shape))
  placed = rebalance(state.buffers, experiment.placement.policy, devices, run.experiment.segments)
  row = {'before': placed.before, 'after': placed.after}
  run.workdir.rows(run.workdir.placements).append({'step': step, **row})
  worst = {name: max(row[name].values()) for name in ('before', 'after')}
  run.writer.write_scalars(step, 'placement', worst)
  display.message(
    f'step {step}  experts placed: busiest device {worst["before"]:.2f} → {worst["after"]:.2f} '
    'times the mean, in the worst layer'
  )
  return dataclasses.replace(state, buffers=placed.buffers)


def _stop_skipping(run: _Run, state: TrainState, step: int) -> None:
  """Saves the state, whose weights are those of the last accepted step, and raises."""
  # Whoever goes on has every chance again.
  fresh = put_whole(np.zeros((), np.int32), state.guard.in_a_row.sharding)
  guard = dataclasses.replace(state.guard, in_a_row=fresh)
  run.saver.save(step, dataclasses.replace(state, guard=guard), None)
  run.saver.finish()
  raise run.faults.error(step)


def _due(step: int, every: int | None) -> bool:
  return every is not None and step % every == 0


class _Pending(NamedTuple):
  """A dispatched step; documents are the [B, T] of its batch."""

  step: int
  metrics: Metrics
  documents: np.ndarray


def _finish(run: _Run, pending: _Pending | None) -> None:
  """Waits for a dispatched step, counts it, and logs it if its turn has come."""
  if pending is None:
    return
  step, metrics, documents = pending
  jax.block_until_ready(metrics['loss'])
  run.clock.tick(step)
  if run.link is not None:
    run.link.tick(run.clock.last_seconds, exchanged=float(metrics['exchanged_bytes']) > 0)
  run.faults.read(step, metrics, documents)
  if step == 1 or step == run.experiment.train_steps or _due(step, run.experiment.cadence.log):
    run.writer.write(step, _numbers(run, step, jax.device_get(metrics)))


def _numbers(run: _Run, step: int, metrics: Metrics) -> dict[str, Any]:
  """Returns the row of a finished step."""
  observed = metrics.pop('observed')
  loads = report.layer_loads(observed, run.experiment.segments)
  drops = report.drop_rates(observed, run.experiment.segments)
  buffers = metrics.pop('buffers')
  biases = report.layer_biases(buffers, run.experiment.segments)
  row = {name: float(value) for name, value in metrics.items()}
  row['bits_per_byte'] = bits_per_byte(row['loss'], run.data.train)
  rate = run.clock.tokens_per_second
  if rate is not None:
    row['tokens_per_second'] = rate
    row['mfu'] = run.step_flops[step - 1] / run.clock.tokens_per_step * rate / run.peak_flops
    row['seconds_left'] = run.clock.seconds_left(run.experiment.train_steps) or 0.0
  row |= run.team.figures()
  row['elapsed_seconds'] = time.perf_counter() - run.started
  row['peak_memory_bytes'] = peak_memory_bytes()
  return {
    **row,
    **report.expert_figures(loads, biases, drops),
    **report.lifecycle_figures(buffers, run.experiment.segments),
    **report.modality_figures(observed, run.experiment.segments),
    **report.attention_figures(observed, run.experiment.segments),
  }


def _evaluate(run: _Run, state: TrainState, step: int, last: bool) -> Evaluation:
  batches = None if last else run.experiment.cadence.evaluate_batches
  measure = functools.partial(
    evaluate, run.program, buffers=state.buffers, split=run.data.heldout, batches=batches
  )
  result = measure(state.params)
  row = {'step': step, **result.numbers(), 'all': batches is None}
  figures = {name: value for name, value in result.numbers().items() if name != 'targets'}
  message = f'step {step}  held-out bits/byte {result.bits_per_byte:.4f}  loss {result.loss:.4f}'
  message += f'  next token right {result.accuracy:.1%}'
  if result.mtp_acceptance is not None:
    message += f'  second token accepted {result.mtp_acceptance:.1%}'
  if run.experiment.ema is not None:
    averaged = measure(state.ema)
    row |= {'ema_loss': averaged.loss, 'ema_bits_per_byte': averaged.bits_per_byte}
    figures['ema_bits_per_byte'] = averaged.bits_per_byte
    message += f'  averaged weights {averaged.bits_per_byte:.4f}'
  run.workdir.rows(run.workdir.evaluations).append(row)
  run.writer.write_scalars(step, 'heldout', figures)
  run.writer.display.message(message)
  return result


def _sample(run: _Run, state: TrainState, step: int) -> None:
  if run.sample is None:
    return
  weights = state.params if run.experiment.ema is None else state.ema
  for row in run.sample(weights, state.buffers):
    run.workdir.rows(run.workdir.samples).append({'step': step, **row})
    line = (row['prompt'] + row['text']).replace('\n', ' ⏎ ')
    run.writer.display.message(f'sample: {line}')
