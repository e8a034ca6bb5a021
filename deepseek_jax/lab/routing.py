"""How evenly a trained model's experts are used, and what evenness costs the tokens."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.batch import Batch
from deepseek_jax.data.packed_split import heldout_batches
from deepseek_jax.data.pipeline import TextData
from deepseek_jax.hub import Pretrained
from deepseek_jax.lab.walk import Call, context_of, walk
from deepseek_jax.layers.moe.interface import Assignment
from deepseek_jax.ops.routing import expert_load

DRAWS = 200
"""Made-up batches that the sampling noise is measured on."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LayerRouting:
  """What a layer's router did with some text.

  Attributes:
    layer: its number.
    loads: [batches, E] choices of real tokens that went to each expert.
    free: share of choices that the token's scores alone would have made too: without selection
      bias, groups, breaker or growth.
    noise: [2] median and 95th percentile, over batches, of the largest load over the mean where
      every expert is as likely as any other: what no router can be better than.
  """

  layer: int
  loads: np.ndarray
  free: float
  noise: tuple[float, float]

  @property
  def evenness(self) -> float:
    """Mean load over the largest, over all text together; 1 is even."""
    total = self.loads.sum(axis=0)
    return float(total.mean() / total.max())

  @property
  def used(self) -> float:
    """Share of experts with at least a tenth of the mean load."""
    total = self.loads.sum(axis=0)
    return float(np.mean(total >= 0.1 * total.mean()))

  @property
  def batch_peak(self) -> tuple[float, float]:
    """Median and 95th percentile, over batches, of the largest load over the mean."""
    return _peaks(self.loads)


def routing(model: Pretrained, batches: Iterable[Batch]) -> list[LayerRouting]:
  """Reads text and returns what the router of every layer with experts did.

  Choices that a dispatch drops for want of room count where they were meant to go.

  Args:
    model: the model.
    batches: [B, T] each.

  Raises:
    ConfigError: no layer of the model has experts, or there is no batch.
  """
  found: dict[int, list[Any]] = {}
  for batch in batches:
    for visit in walk(model, context_of(model, batch), _read_choices):
      if visit.seen:
        found.setdefault(visit.layer, []).append(visit.seen[-1])
  if not found:
    raise ConfigError('routing: no layer of this model has experts, or there is no text')
  layers = []
  for layer, seen in found.items():
    loads = np.array([load for load, _ in seen], np.float64)
    free = sum(float(same) for _, same in seen) / loads.sum()
    layers.append(LayerRouting(layer=layer, loads=loads, free=free, noise=_noise(loads)))
  return layers


def unread_batches(model: Pretrained, data: TextData, tokens: int) -> Iterator[Batch]:
  """Yields text that the model was not trained on, until there are enough tokens.

  First the held-out documents, then the training rows that the run has not come to: those after its
  last step, in its first epoch.

  Args:
    model: a run's model.
    data: that run's prepared text.
    tokens: how many.

  Raises:
    ConfigError: there are fewer.
  """
  size = data.config.batch_size
  rest = max(data.train.rows // size - model.step, 0)
  train = itertools.islice(data.train_batches(model.step), rest)
  total = 0
  for batch in itertools.chain(heldout_batches(data.heldout, size), train):
    yield batch
    total += int(np.sum(np.asarray(batch.segments) > 0))
    if total >= tokens:
      return
  raise ConfigError(f'{tokens} tokens that the run has not read: there are {total}')


def routing_table(layers: list[LayerRouting]) -> str:
  """Returns a Markdown table of the layers."""
  lines = [
    '| layer | mean/max of all | experts used | max/mean of a batch (95 %) | sampling noise (95 %) '
    '| chosen freely |',
    '|---|---:|---:|---:|---:|---:|',
  ]
  for x in layers:
    peak, noise = (f'{median:.3f} ({high:.3f})' for median, high in (x.batch_peak, x.noise))
    lines.append(
      f'| {x.layer} | {x.evenness:.3f} | {x.used:.0%} | {peak} | {noise} | {x.free:.1%} |'
    )
  return '\n'.join(lines)


def _read_choices(call: Call) -> tuple[jax.Array, jax.Array] | None:
  """Of a call that routes: loads [E] of real tokens, and how many choices were made freely."""
  if not isinstance(call.result, Assignment):
    return None
  experts, scores = call.result.experts, call.result.scores
  real = call.arguments[1].real.reshape(-1)
  count, top_k = scores.shape[-1], experts.shape[-1]
  wished = jax.lax.top_k(scores, top_k)[1]
  same = jnp.any(experts[:, :, None] == wished[:, None, :], axis=-1) & real[:, None]
  return expert_load(experts, real, count), jnp.sum(same)


def _noise(loads: np.ndarray) -> tuple[float, float]:
  generator = np.random.default_rng(0)
  experts, totals = loads.shape[1], loads.sum(axis=1).astype(np.int64)
  # Choices of one token differ from each other, which makes true noise a little smaller.
  drawn = generator.choice(totals, DRAWS)
  return _peaks(generator.multinomial(drawn, np.full(experts, 1 / experts)).astype(np.float64))


def _peaks(loads: np.ndarray) -> tuple[float, float]:
  peaks = loads.max(axis=1) / loads.mean(axis=1)
  return float(np.median(peaks)), float(np.quantile(peaks, 0.95))
