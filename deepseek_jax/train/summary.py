"""What a run would be, in words and numbers, before it is one."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from deepseek_jax.core.describe import bytes_text, si, table
from deepseek_jax.core.tree import bytes_of
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.residual import Add
from deepseek_jax.models.cost import (
  Weight,
  active_parameters,
  active_share,
  forward_flops,
  making_flops,
  medium_flops,
  training_flops,
  weights_of,
)
from deepseek_jax.models.decoder import Family, plan_segments
from deepseek_jax.models.encoder import encoder_segments
from deepseek_jax.models.multimodal import Multimodal
from deepseek_jax.models.plan import Block, Segment
from deepseek_jax.sharding.rules import shard_count
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.step import Program


def describe_plan(segments: Sequence[Segment]) -> str:
  """Returns one line a segment: which layers, how often, of what kinds."""
  rows, start = [], 0
  for part in segments:
    kinds = ' | '.join(map(_kinds_of, part.pattern))
    scan = f'×{part.repeats} over stages' if part.axis == 'stage' else f'×{part.repeats}'
    rows.append((f'{start}–{start + part.layers - 1}', scan, kinds))
    start += part.layers
  return table(rows, ('layers', 'scan', 'blocks'))


def _kinds_of(block: Block) -> str:
  kinds = f'{type(block.attention).__name__} + {type(block.feed_forward).__name__}'
  # The plain residual goes without saying.
  return kinds if isinstance(block.residual, Add) else f'{kinds} in {block.residual!r}'


def describe_layers(model: Family, segments: Sequence[Segment] | None = None) -> str:
  """Returns the plan of a model, or the given one of it; that of its encoder comes first."""
  plan = describe_plan(segments or plan_segments(model))
  if not isinstance(model, Multimodal):
    return plan
  parts = [
    f'encoder of `{kind}`\n{describe_plan(encoder_segments(encoder))}'
    for kind, encoder in model.encoders.items()
    if kind != 'tile'
  ]
  return '\n\n'.join([*parts, f'decoder\n{plan}'])


def describe_stages(experiment: Experiment) -> str:
  """Returns what lies on each stage of a pipeline, and how long the stages are idle."""
  stages, model = experiment.stages, experiment.model
  if stages is None:
    return 'no pipeline'
  staged = sum(part.layers for part in experiment.segments if part.axis == 'stage')
  rest = len(model.layers()) - staged
  rows = [
    ('stages', f'{stages.count}, {staged // stages.count} layers each'),
    ('layers on every stage', str(rest)),
    ('microbatches', str(stages.schedule.microbatches)),
    ('ticks of a forward pass', str(stages.ticks)),
    ('of them idle (the bubble)', f'{stages.bubble_share:.1%}'),
  ]
  return table(rows, (f'pipeline {type(stages.schedule).__name__}', ''))


def describe_parameters(weights: Sequence[Weight]) -> str:
  """Returns a table of every parameter array: address, shape, axes, count."""
  rows = [
    (
      weight.address,
      '×'.join(map(str, weight.shape)),
      ' '.join(axis or '·' for axis in weight.axes),
      f'{weight.size:,}',
    )
    for weight in weights
  ]
  return table(rows, ('address', 'shape', 'axes', 'parameters'))


def step_flops(experiment: Experiment, weights: Sequence[Weight]) -> np.ndarray:
  """Returns the training FLOPs of every step of a run, [train_steps] float64.

  Encoding pictures and making experts' matrices are counted; choices that are not active yet are
  not. Where nothing grows, all steps cost the same.
  """
  model, data = experiment.model, experiment.data
  media = {kind: shape.values[0] for kind, shape in data.media.items()}
  token = training_flops(model, list(weights), data.length, media)
  making = 3.0 * making_flops(model) * experiment.microbatches
  active = active_share(model, token / 3, experiment.train_steps)
  return token * active * data.length * data.batch_size + making


def describe_cost(experiment: Experiment, weights: Sequence[Weight]) -> str:
  """Returns parameters, FLOPs a token, and tokens of the whole run."""
  model, data = experiment.model, experiment.data
  step_tokens = data.batch_size * data.length
  media = {kind: shape.values[0] for kind, shape in data.media.items()}
  forward = forward_flops(model, list(weights), data.length, media)
  training = training_flops(model, list(weights), data.length, media)
  making = 3.0 * making_flops(model) * experiment.microbatches
  rows = [
    ('parameters', si(sum(weight.size for weight in weights))),
    ('of them met by a token', si(active_parameters(list(weights)))),
    *(
      (f'FLOPs of encoding one `{kind}`', si(medium_flops(model, list(weights), kind)))
      for kind in media
    ),
    ('forward FLOPs a token', si(forward)),
    ('training FLOPs a token', si(training)),
    *([("FLOPs a step of making the experts' matrices", si(making))] if making else []),
    ('tokens a step', f'{step_tokens:,} ({data.batch_size} rows of {data.length})'),
    ('tokens of the run', si(step_tokens * experiment.train_steps)),
    ('training FLOPs of the run', f'{step_flops(experiment, weights).sum():.2e}'),
  ]
  return table(rows, ('cost', ''))


def describe_memory(program: Program, compile_step: bool) -> str:
  """Returns bytes a device needs: the state exactly, and the step's if it is compiled.

  Args:
    program: the functions of the run.
    compile_step: whether to compile the training step and ask the compiler.
  """
  sizes = {str(axis): size for axis, size in program.mesh.shape.items()}

  def local(tree: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
      pieces = 1
      for entry in leaf.sharding.spec:
        pieces *= shard_count(entry, sizes)
      total += bytes_of(leaf) // pieces
    return total

  state = program.abstract_state
  rows = [
    ('parameters', bytes_text(local(state.params))),
    ('optimizer state', bytes_text(local(state.opt_state))),
    *([('averaged weights', bytes_text(local(state.ema)))] if jax.tree.leaves(state.ema) else []),
    ('gradients', bytes_text(local(state.params))),
  ]
  if compile_step:
    compiled = program.step.lower(state, program.abstract_batch()).compile()
    stats = compiled.memory_analysis()
    rows += [
      ('temporaries of the step, gradients among them', bytes_text(stats.temp_size_in_bytes)),
      (
        'peak of the step',
        bytes_text(
          stats.temp_size_in_bytes
          + stats.argument_size_in_bytes
          + stats.output_size_in_bytes
          - stats.alias_size_in_bytes
        ),
      ),
    ]
  else:
    rows.append(('temporaries of the step', 'not compiled: too many parameters for this machine'))
  return table(rows, ('memory per device', ''))


def describe_batch(batch: Batch) -> str:
  """Returns shapes, dtypes and the first numbers of a batch's [B, T] arrays."""
  rows = [
    (
      '/'.join(str(getattr(key, 'name', getattr(key, 'key', key))) for key in path),
      str(tuple(value.shape)),
      str(value.dtype),
      ' '.join(map(str, value[0].reshape(-1)[:8].tolist())),
    )
    for path, value in jax.tree_util.tree_leaves_with_path(batch)
  ]
  return table(rows, ('batch', 'shape', 'dtype', 'first row begins'))


def experiment_weights(program: Program) -> list[Weight]:
  """Returns the parameters [...] of a run's model with their axes."""
  experiment = program.experiment
  segments = experiment.segments
  return weights_of(experiment.model, program.abstract_state.params, program.axes, segments)


def describe_program(program: Program) -> str:
  """Returns plan, parameters and cost of a run."""
  weights, experiment = experiment_weights(program), program.experiment
  return '\n\n'.join(
    (
      describe_layers(experiment.model, experiment.segments),
      *([] if experiment.stages is None else [describe_stages(experiment)]),
      describe_parameters(weights),
      describe_cost(program.experiment, weights),
    )
  )
