"""Muon: momentum whose every matrix is made nearly orthogonal before it is applied."""

import dataclasses
import math
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from deepseek_jax.optim.adamw import (
  MOMENT_FORMATS,
  MomentFormat,
  clip_in_float32,
  scale_by_moments,
)
from deepseek_jax.optim.check import check_fields
from deepseek_jax.optim.dimension import decay_mask, muon_dimensions
from deepseek_jax.optim.schedule import ScheduleFn

# Odd polynomials a·s + b·s³ + c·s⁵ applied to the singular values s of a matrix. The first pushes
# small values up fast but only to about 0.7 … 1.2; the second then settles them at exactly 1.
FAST_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SETTLING_COEFFICIENTS = (2.0, -1.5, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
  """Orthogonalised momentum for matrices, AdamW for the rest: the optimizer of DeepSeek-V4.

  Each layer's and each expert's matrix is orthogonalised by itself; which weights are matrices
  follows from their axis names (`optim.dimension`). Embedding, output head and vectors go to
  AdamW. The learning rate of update k, counted from 0, is `peak_lr * schedule_fn(k)`.
  DeepSeek-V4's own recipe is `fast_steps=8, settling_steps=2, consistent_rms=0.18`.

  Attributes:
    peak_lr: learning rate where the schedule's factor is 1.
    momentum: how much of the running mean gradient is kept each step (Nesterov form).
    fast_steps: Newton–Schulz steps that raise small singular values fast.
    settling_steps: Newton–Schulz steps after them that bring the values to 1 exactly.
    consistent_rms: root mean square of an update at learning rate 1, the same for every shape;
      0.2 is what AdamW's updates have, so that AdamW's `peak_lr` carries over.
    adam_ratio: learning rate of AdamW's share of the weights, as a multiple of Muon's.
    beta1: AdamW's share: how much of the mean gradient is kept each step.
    beta2: AdamW's share: how much of the mean squared gradient is kept each step.
    epsilon: AdamW's share: added to the root of the mean squared gradient.
    weight_decay: share of a matrix removed each step, times its learning rate.
    clip_norm: gradients whose global norm exceeds this are scaled down to it; None never clips.
    moments: number format the running means are stored in; arithmetic is float32.

  Source: Jordan et al. (kellerjordan.github.io/posts/muon, 2024); Moonlight (arXiv 2502.16982)
    section 2.2; DeepSeek-V4 (arXiv 2606.19348), its section on the optimizer.
  """

  peak_lr: float
  momentum: float = 0.95
  fast_steps: int = 5
  settling_steps: int = 0
  consistent_rms: float = 0.2
  adam_ratio: float = 1.0
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float | None = 1.0
  moments: MomentFormat = 'float32'

  traced = ('peak_lr', 'weight_decay')

  def __post_init__(self):
    """Validates the fields.

    Raises:
      ConfigError: a field is out of its range.
    """
    check_fields(
      self,
      {
        'peak_lr': (self.peak_lr > 0, 'a number above 0'),
        'momentum': (0 <= self.momentum < 1, 'a number in [0, 1)'),
        'fast_steps': (self.fast_steps >= 1, 'a count of at least 1'),
        'settling_steps': (self.settling_steps >= 0, 'a count of at least 0'),
        'consistent_rms': (self.consistent_rms > 0, 'a number above 0'),
        'adam_ratio': (self.adam_ratio > 0, 'a number above 0'),
        'beta1': (0 <= self.beta1 < 1, 'a number in [0, 1)'),
        'beta2': (0 <= self.beta2 < 1, 'a number in [0, 1)'),
        'epsilon': (self.epsilon > 0, 'a number above 0'),
        'weight_decay': (self.weight_decay >= 0, 'a number of at least 0'),
        'clip_norm': (self.clip_norm is None or self.clip_norm > 0, 'None or a number above 0'),
        'moments': (self.moments in MOMENT_FORMATS, f'one of {MOMENT_FORMATS}'),
      },
    )

  def build(self, schedule_fn: ScheduleFn, axes: Any) -> optax.GradientTransformation:
    """Returns the pair of pure functions that turns gradients into updates.

    Args:
      schedule_fn: factor of `peak_lr` by step.
      axes: like the parameters, with a tuple of logical axis names for each leaf.

    Raises:
      ValueError: a weight is neither a vector nor a stack of matrices.
    """
    dimensions = muon_dimensions(axes)
    is_adam = jax.tree.map(lambda entry: entry is None, dimensions, is_leaf=_is_entry)
    labels = jax.tree.map(lambda adam: 'adam' if adam else 'muon', is_adam)
    adam = scale_by_moments(self.beta1, self.beta2, self.epsilon, self.moments)
    return optax.chain(
      clip_in_float32(self.clip_norm),
      optax.partition({'muon': self._orthogonalise(dimensions), 'adam': adam}, labels),
      optax.add_decayed_weights(self.weight_decay, decay_mask(axes)),
      # After the decay: a weight decays by its own learning rate.
      optax.masked(optax.scale(self.adam_ratio), is_adam),
      optax.scale_by_learning_rate(lambda step: self.peak_lr * schedule_fn(step)),
    )

  def _orthogonalise(self, dimensions: Any) -> optax.GradientTransformation:
    """Momentum, orthogonalised, at one root mean square whatever the shape."""
    # `optax.partition` hides the other partition's weights behind masked nodes, here as there.
    entries = jax.tree.map(
      lambda entry: optax.MaskedNode() if entry is None else entry, dimensions, is_leaf=_is_entry
    )
    coefficients = (FAST_COEFFICIENTS,) * self.fast_steps
    coefficients += (SETTLING_COEFFICIENTS,) * self.settling_steps
    direction = scale_each_matrix(entries, coefficients, self.momentum, self.moments)

    def scale(update: jax.Array, entry: MuonDimensionNumbers) -> jax.Array:
      # An orthogonal matrix of sides n <= m has root mean square 1/√m.
      return update * (self.consistent_rms * math.sqrt(_longer_side(update, entry)))

    rescale = optax.stateless(lambda updates, params: jax.tree.map(scale, updates, entries))
    return optax.chain(direction, rescale)


def scale_each_matrix(
  entries: Any,
  coefficients: tuple[tuple[float, float, float], ...],
  momentum: float,
  moments: MomentFormat,
) -> optax.GradientTransformation:
  """`optax.contrib.scale_by_muon`, mapped over the axes that count matrices.

  Optax itself merges those axes into one by a reshape. Merging layers with experts that are
  sharded cannot be expressed as a sharding, so that every device would gather all experts; mapping
  leaves the axes, and with them the sharding, as they are. The numbers are the same.

  Args:
    entries: a tree of `MuonDimensionNumbers`, with masked nodes for weights of others.
    coefficients: of the polynomial of each Newton–Schulz step.
    momentum: how much of the running mean gradient is kept each step (Nesterov form).
    moments: number format of the running mean.
  """

  def muon(dimensions: MuonDimensionNumbers | None) -> optax.GradientTransformation:
    return scale_by_muon(
      ns_coeffs=coefficients,
      ns_steps=len(coefficients),
      beta=momentum,
      mu_dtype=moments,
      weight_dimension_numbers=dimensions,
    )

  def update(
    updates: optax.Updates, state: MuonState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, MuonState]:
    del params

    def one_weight(
      gradient: jax.Array, mean: jax.Array, entry: MuonDimensionNumbers
    ) -> tuple[jax.Array, MuonState]:
      copies, sides = _without_copies(entry, gradient.ndim)

      def one_matrix(gradient, mean):
        return muon(sides).update(gradient, state._replace(mu=mean))

      function = one_matrix
      # The last one wrapped is the first one stripped: from the last axis, so that the numbers
      # of those before it still hold.
      for axis in copies:
        kept = MuonState(count=None, mu=axis, ns_coeffs=None)
        function = jax.vmap(function, in_axes=axis, out_axes=(axis, kept))
      return function(gradient, mean)

    pairs = jax.tree.map(one_weight, updates, state.mu, entries)
    directions = jax.tree.map(lambda _, pair: pair[0], updates, pairs)
    means = jax.tree.map(lambda _, pair: pair[1].mu, updates, pairs)
    return directions, state._replace(count=optax.safe_increment(state.count), mu=means)

  return optax.GradientTransformation(muon(None).init, update)


def _without_copies(
  entry: MuonDimensionNumbers, rank: int
) -> tuple[list[int], MuonDimensionNumbers]:
  """Splits the axes of a weight into those that count matrices and, renumbered, the rest."""
  sides = (*entry.reduction_axis, *entry.output_axis)
  copies = [axis for axis in range(rank) if axis not in sides]
  number = {axis: i for i, axis in enumerate(sorted(sides))}
  return copies, MuonDimensionNumbers(
    reduction_axis=tuple(number[axis] for axis in entry.reduction_axis),
    output_axis=tuple(number[axis] for axis in entry.output_axis),
  )


def _is_entry(node: Any) -> bool:
  """Leaves of a tree of Muon dimensions; None is one of them."""
  return node is None or isinstance(node, MuonDimensionNumbers)


def _longer_side(array: jax.Array, entry: MuonDimensionNumbers) -> int:
  """Size of the longer side of the matrices an array holds."""
  sides = (entry.reduction_axis, entry.output_axis)
  return max(math.prod(array.shape[axis] for axis in side) for side in sides)
