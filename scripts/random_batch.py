"""Batches for measurements: random tokens, which leave nothing to luck."""

from typing import Any

import numpy as np

from deepseek_jax.data.batch import Batch


def random_batch(experiment: Any) -> Any:
  """Returns a batch [B, T] of random tokens, one document a row: no padding, no lucky caches."""
  data = experiment.data
  draw = np.random.default_rng(0).integers(
    0, experiment.model.vocab, (data.batch_size, data.length + 1)
  )
  draw = draw.astype(np.int32)
  shape = (data.batch_size, data.length)
  positions = np.broadcast_to(np.arange(data.length, dtype=np.int32), shape)
  ones = np.ones(shape, np.int32)
  return Batch(draw[:, :-1], draw[:, 1:], ones.astype(np.float32), positions, ones, ones * 0)  # type: ignore[arg-type]
