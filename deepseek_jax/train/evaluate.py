"""Held-out loss."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.data.batch import Batch, Rows
from deepseek_jax.data.packed_split import heldout_batches
from deepseek_jax.train.step import Program


class Evaluation(NamedTuple):
  """Figures on held-out text.

  Attributes:
    loss: nats a token.
    bits_per_byte: bits a byte of the text; comparable between tokenizers.
    targets: tokens that were predicted.
    accuracy: share of them that the model found likeliest.
    mtp_loss: nats a token of those further ahead, the mean over the depths of MTP; None without.
    mtp_acceptance: share of tokens two places ahead at which the first depth of MTP chooses what
      the model itself chooses a place later, both greedily and reading the text as it is; what
      speculative decoding would gain by. None without MTP.
  """

  loss: float
  bits_per_byte: float
  targets: int
  accuracy: float
  mtp_loss: float | None = None
  mtp_acceptance: float | None = None

  def numbers(self) -> dict[str, float]:
    """Returns name → figure of those that there are."""
    return {name: value for name, value in self._asdict().items() if value is not None}


def bits_per_byte(loss: float, split: Rows) -> float:
  """Converts nats a token to bits a byte, by the split's own tokens per byte."""
  return float(split.bits_per_byte(loss * split.targets))


def evaluate(
  program: Program, params: Any, buffers: Any, split: Rows, batches: int | None = None
) -> Evaluation:
  """Measures the loss of parameters on a split.

  Every token but each document's first is predicted exactly once, from the row it lies in.

  Args:
    program: the compiled functions.
    params: weights on the program's mesh.
    buffers: buffers on the program's mesh.
    split: the text.
    batches: how many batches to take, spread evenly over the split; None takes all.
  """
  size = program.experiment.data.batch_size
  chosen: Iterator[Batch] = heldout_batches(split, size, program.own_rows)
  total = math.ceil(split.rows / size)
  if batches is not None and batches < total:
    numbers = {i * total // batches for i in range(batches)}
    chosen = itertools.compress(chosen, (number in numbers for number in range(total)))
  sums: dict[str, Any] = {'nats': 0.0, 'targets': 0.0}
  # The next batch is sent off before the last one is waited for.
  pending = None
  for batch in chosen:
    current = program.evaluate(params, buffers, program.put(batch))
    pending, ready = current, pending
    _add(sums, ready)
  _add(sums, pending)
  count = max(sums['targets'], 1.0)
  loss, accuracy = (float(sums[name] / count) for name in ('nats', 'correct'))
  result = Evaluation(loss, bits_per_byte(loss, split), int(sums['targets']), accuracy)
  if 'accepted' not in sums:
    return result
  targets = np.maximum(sums['mtp_targets'], 1.0)
  return result._replace(
    mtp_loss=float(np.mean(sums['mtp_nats'] / targets)),
    mtp_acceptance=float(sums['accepted'] / targets[0]),
  )


def _add(sums: dict[str, Any], values: Any) -> None:
  for key, value in ({} if values is None else values).items():
    sums[key] = sums.get(key, 0.0) + np.asarray(value, np.float64)
