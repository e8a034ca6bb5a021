"""What a run is beside its loop: precision, checks, notes of how it went, samples, report."""

import contextlib
import os
import pathlib
from typing import Any

from scripts import launch

SAMPLED_PICTURES = 12
"""Held-out pictures that a run on captions describes when it samples."""


def run(
  experiment: Any, workdir: Any, cache: pathlib.Path, config_path: str | None, display_kind: Any
) -> int:
  """Trains, and draws the report however that ends.

  Args:
    experiment: what to run.
    workdir: the run's folder; a run that is there goes on.
    cache: folder for tokens and pack plans.
    config_path: of the config file, for the report; None where it has the experiment's name.
    display_kind: what the terminal shows: 'auto', 'live', 'line' or 'quiet'.

  Returns:
    The exit code.
  """
  from deepseek_jax.core.allocator import keep_freed_memory
  from deepseek_jax.sharding.agreement import alone, first, from_first, leave
  from deepseek_jax.train import events
  from deepseek_jax.train.display import make_display
  from deepseek_jax.train.experiment import resolved
  from deepseek_jax.train.interrupt import StoppedEarlyError
  from deepseek_jax.train.loop import train

  keep_freed_memory()
  experiment = resolved(experiment, from_first(lambda: settle(experiment, workdir)))
  check(experiment)
  from_first(lambda: workdir.write(experiment))
  total, every = experiment.train_steps, experiment.cadence.log
  display = make_display(total, kind=display_kind, every_steps=every, name=experiment.name)
  if not alone():
    workdir, display = take_part(workdir, display, total, every)
  begun = from_first(lambda: begin(workdir))
  try:
    outcome = train(experiment, workdir, cache, display, make_sampler(experiment))
  except StoppedEarlyError as stopped:
    print(f'{stopped}: stopped before the first new step; nothing to save', flush=True)
    if first():
      events.record(workdir.path, begun, 'stopped', str(stopped))
    leave()
    # A compilation may still run in a daemon thread, which Python cannot wait for at its end.
    os._exit(0)
  except Exception as error:
    display.close()
    if first():
      note_failure(workdir, error)
      launch.try_report(workdir.path, experiment.name, config_path)
    raise
  if first():
    signal = outcome.stopped_by
    events.record(workdir.path, outcome.step, 'stopped' if signal else 'finished', signal)
    launch.try_report(workdir.path, experiment.name, config_path)
  if outcome.stopped_by is None:
    print(f'checkpoint: {workdir.checkpoints / str(outcome.step)}')
  return 0


def settle(experiment: Any, workdir: Any) -> Any:
  """Compares a run with the earlier one in its folder; returns the precision that both have."""
  from deepseek_jax.core.precision import BFloat16, Fastest, Float32
  from deepseek_jax.train.throughput import fastest_precision
  from deepseek_jax.train.workdir import compare

  earlier = workdir.read()
  # A start that failed before its first step, on a misspelt path say, binds nobody.
  if earlier is not None and workdir.trained:
    for change in compare(earlier, experiment):
      print(f'differs from the run in {workdir.path}: {change}')
    return earlier.precision
  if not isinstance(experiment.precision, Fastest):
    return experiment.precision
  chosen, rates = fastest_precision()
  speeds = ', '.join(f'{name} {rate["all"] / 1e9:.0f} GFLOP/s' for name, rate in rates.items())
  print(f'precision: {chosen} ({speeds} on products of a training step)', flush=True)
  return Float32() if chosen == 'float32' else BFloat16()


def take_part(workdir: Any, display: Any, total: int, every: int) -> tuple[Any, Any]:
  """Gives every process of several its log; all but the first write and print nowhere else.

  Returns:
    The folder and the display of this process.
  """
  import jax

  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.sharding.agreement import first, from_first
  from deepseek_jax.train.display import Both, LineDisplay
  from deepseek_jax.train.workdir import Follower

  log = workdir.log(jax.process_index())
  from_first(lambda: log.parent.mkdir(exist_ok=True))
  if not log.parent.is_dir():
    raise ConfigError(
      f'{workdir.path}: process {jax.process_index()} does not see what process 0 wrote there; '
      'expected a --workdir on a disk that all hosts share'
    )
  stream = log.open('a', encoding='utf-8', buffering=1)
  if first():
    return workdir, Both(display, LineDisplay(total, every, stream))
  # What C++ says when it ends this process goes there too.
  for number in (1, 2):
    os.dup2(stream.fileno(), number)
  return Follower(workdir.path), LineDisplay(total, every, stream)


def note_failure(workdir: Any, error: Exception) -> None:
  """Writes down that, where and why a run failed."""
  from deepseek_jax.train import events
  from deepseek_jax.train.disk import DiskFullError
  from deepseek_jax.train.metrics import JsonLines

  last = max((row['step'] for row in JsonLines(workdir.path / 'metrics.jsonl').read()), default=0)
  # What failed may be the disk, which then has no room for this either.
  with contextlib.suppress(DiskFullError):
    events.record(workdir.path, last, 'failed', f'{type(error).__name__}: {error}')


def begin(workdir: Any) -> int:
  """Notes where the run happens and that it starts; returns the step it goes on from."""
  from deepseek_jax.train import environment, events
  from deepseek_jax.train.checkpoint import Checkpoints

  environment.write(workdir.path / 'environment.json', environment.collect(os.environ))
  step = (Checkpoints(workdir.checkpoints).latest() or 0) if workdir.checkpoints.exists() else 0
  events.record(workdir.path, step, 'resumed' if step else 'started')
  return step


def check(experiment: Any) -> None:
  """Raises every fault at once, before anything is written."""
  import jax

  from deepseek_jax.core.config import ConfigError

  errors = experiment.check(len(jax.devices()))
  if errors:
    raise ConfigError(errors)


def make_sampler(experiment: Any) -> Any:
  """Returns what makes the function that samples, or None where there is nothing to continue."""
  from deepseek_jax.data.captions import ImageCaptions

  if isinstance(experiment.data, ImageCaptions):
    return make_captioner
  if not experiment.prompts:
    return None

  def make(program: Any, data: Any) -> Any:
    from deepseek_jax.infer.generate import sample_texts
    from deepseek_jax.infer.sample import Sample

    def sample(params: Any, buffers: Any) -> list[dict[str, Any]]:
      return sample_texts(
        program.decoder,
        {'params': params, 'buffers': buffers},
        data.tokenizer,
        experiment.prompts,
        max_new_tokens=48,
        sampler=Sample(temperature=0.8, top_p=0.95),
        seed=experiment.seed,
      )

    return sample

  return make


def make_captioner(program: Any, data: Any) -> Any:
  """Returns the function that describes some held-out pictures."""
  from deepseek_jax.infer.caption import sample_captions

  def sample(params: Any, buffers: Any) -> list[dict[str, Any]]:
    variables = {'params': params, 'buffers': buffers}
    return sample_captions(program.decoder, variables, data.heldout, SAMPLED_PICTURES)

  return sample
