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
  from deepseek_jax.core.precision import BFloat16, Fastest, Float32
  from deepseek_jax.train import events
  from deepseek_jax.train.disk import DiskFullError
  from deepseek_jax.train.display import make_display
  from deepseek_jax.train.experiment import resolved
  from deepseek_jax.train.interrupt import StoppedEarlyError
  from deepseek_jax.train.loop import train
  from deepseek_jax.train.metrics import JsonLines
  from deepseek_jax.train.throughput import fastest_precision
  from deepseek_jax.train.workdir import compare

  keep_freed_memory()
  earlier = workdir.read()
  # A start that failed before its first step, on a misspelt path say, binds nobody.
  if earlier is not None and workdir.trained:
    for change in compare(earlier, experiment):
      print(f'differs from the run in {workdir.path}: {change}')
    experiment = resolved(experiment, earlier.precision)
  elif isinstance(experiment.precision, Fastest):
    chosen, rates = fastest_precision()
    speeds = ', '.join(f'{name} {rate["all"] / 1e9:.0f} GFLOP/s' for name, rate in rates.items())
    print(f'precision: {chosen} ({speeds} on products of a training step)', flush=True)
    experiment = resolved(experiment, Float32() if chosen == 'float32' else BFloat16())
  check(experiment)
  workdir.write(experiment)
  total, every = experiment.train_steps, experiment.cadence.log
  display = make_display(total, kind=display_kind, every_steps=every, name=experiment.name)
  begun = begin(workdir)
  try:
    outcome = train(experiment, workdir, cache, display, make_sampler(experiment))
  except StoppedEarlyError as stopped:
    print(f'{stopped}: stopped before the first new step; nothing to save', flush=True)
    events.record(workdir.path, begun, 'stopped', str(stopped))
    # A compilation may still run in a daemon thread, which Python cannot wait for at its end.
    os._exit(0)
  except Exception as error:
    display.close()
    last = max((row['step'] for row in JsonLines(workdir.path / 'metrics.jsonl').read()), default=0)
    # What failed may be the disk, which then has no room for this either.
    with contextlib.suppress(DiskFullError):
      events.record(workdir.path, last, 'failed', f'{type(error).__name__}: {error}')
    launch.try_report(workdir.path, experiment.name, config_path)
    raise
  signal = outcome.stopped_by
  events.record(workdir.path, outcome.step, 'stopped' if signal else 'finished', signal)
  launch.try_report(workdir.path, experiment.name, config_path)
  if outcome.stopped_by is None:
    print(f'checkpoint: {workdir.checkpoints / str(outcome.step)}')
  return 0


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
