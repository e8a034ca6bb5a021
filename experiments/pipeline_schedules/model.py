"""The model that the pipeline runs, its data, and a stage of it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import quickstart
from deepseek_jax.core.override import override
from deepseek_jax.core.precision import Float32
from deepseek_jax.data.batch import Batch
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.pods.schedule.measure import init_canonical
from deepseek_jax.pods.schedule.split import Split, split
from deepseek_jax.pods.schedule.units import Data, Unit, join, model_units
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.objective import Totals, batch_totals

CHANGES: dict[str, Any] = {
  'name': 'pipeline_schedules',
  'model.depth': 5,
  'data.length': 128,
  'precision': Float32(),
}
"""Quickstart's model with as many layers as make two even halves, in float32."""


TINY: dict[str, Any] = {
  'model.depth': 3,
  'model.width': 32,
  'model.vocab': 264,
  'data.length': 32,
  'data.tokenizer': Bytes(),
}
"""What makes a model of it that compiles in seconds: for a test of the processes."""


def experiment(tiny: bool = False) -> Experiment:
  """Returns the run whose step is pipelined; `tiny` only to see that everything works."""
  changes = {**CHANGES, **TINY} if tiny else CHANGES
  return override(quickstart.get_config(), changes)[0]


def batch_of(config: Experiment, rows: int) -> Batch:
  """Returns a batch of random tokens, [rows, T], two documents and some padding a row."""
  chance, length = np.random.default_rng(0), config.data.length
  tokens = chance.integers(0, config.model.vocab, (rows, length), np.int32)
  place = np.arange(length, dtype=np.int32)
  segments = np.zeros((rows, length), np.int32)
  positions = np.zeros_like(segments)
  for row in range(rows):
    middle, end = chance.integers(length // 4, length // 2), length - chance.integers(0, 9)
    segments[row] = np.where(place < middle, 1, np.where(place < end, 2, 0))
    positions[row] = np.where(place < middle, place, place - middle)
  weights = (segments > 0).astype(np.float32)
  return Batch(tokens, np.roll(tokens, -1, axis=1), weights, positions, segments, segments - 1)


def totals_of(config: Experiment, batch: Batch) -> Totals:
  """Returns the divisors of the whole batch [B, T]."""
  return batch_totals(batch, 0 if config.model.mtp is None else config.model.mtp.depth)


def stage(
  config: Experiment, cut: tuple[int, int], counts: Sequence[int], rows: int
) -> tuple[Unit, Split, Any, tuple[dict[int, list[Data]], Any]]:
  """Builds a stage.

  Args:
    config: the run.
    cut: the first unit of the stage, and the first beyond it.
    counts: numbers of microbatches of a step.
    rows: of one microbatch.

  Returns:
    The stage's unit, its split backward pass, its weights, and the data of every microbatch of
    steps with as many, with the shapes of what comes in.
  """
  units = model_units(config)
  unit = join(units[slice(*cut)])
  params, buffers = jax.jit(lambda: init_canonical(config))()
  data: dict[int, list[Data]] = {}
  for count in counts:
    batch = batch_of(config, count * rows)
    totals = totals_of(config, batch)
    data[count] = []
    for m in range(count):
      part = jax.tree.map(lambda x, m=m: jnp.asarray(x[m * rows : (m + 1) * rows]), batch)
      data[count].append(Data(part, buffers, totals.targets, jnp.float32(totals.rows)))
  one = data[counts[0]][0]
  x: Any = {}
  if cut[0]:
    x = jax.eval_shape(units[0].run, units[0].weights(params), {}, one)
  weights = unit.weights(params)
  return unit, split(unit.run, weights, x, one, 'cpu'), weights, (data, x)
