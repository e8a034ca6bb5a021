"""What training minimises: next-token and further-ahead cross-entropy, and the layers' losses."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.context import Context, in_order, sequence_devices, shift_left
from deepseek_jax.layers.context_parallel import ContextParallel, Ring, arrange
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.optim.schedule import Constant, Schedule, ScheduleFn
from deepseek_jax.sharding.rules import Rules
from deepseek_jax.train.vocabulary_loss import choice, cross_entropy


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
  """Cross-entropy of the next token, plus that of tokens further ahead where the model has MTP.

  Attributes:
    mtp_weight: peak weight λ of the mean MTP loss.
    mtp_schedule: factor on λ over training (DeepSeek-V3: 0.3, then 0.1).
    chunk: positions of each row whose logits exist at once.

  Source: DeepSeek-V3, arXiv 2412.19437, equations 24 and 25.
  """

  mtp_weight: float = 0.3
  mtp_schedule: Schedule = Constant()
  chunk: int = 128

  traced = ('mtp_weight',)

  def __post_init__(self):
    errors = []
    if self.mtp_weight < 0:
      errors.append(f'`mtp_weight` is {self.mtp_weight}; expected 0 or more')
    if self.chunk < 1:
      errors.append(f'`chunk` is {self.chunk}; expected 1 or more positions')
    if errors:
      raise ConfigError(errors)

  def build(self, total_steps: int) -> ScheduleFn:
    """Returns the weight λ at each step, [] float32."""
    factor = self.mtp_schedule.build(total_steps)
    return lambda step: self.mtp_weight * factor(step)


class Totals(NamedTuple):
  """Divisors of a whole batch, made before it is cut into microbatches.

  They depend on the data alone. Dividing every sum by them once makes accumulated gradients those
  of the whole batch; a mean of microbatch means would weigh short documents too much.

  Attributes:
    targets: [1 + depth] float32, targets of the next token and of each MTP depth.
    rows: rows B of the batch.
  """

  targets: jax.Array
  rows: int


def target_weights(batch: Batch, depth: int) -> jax.Array:
  """Returns the loss weight [1 + depth, B, T] of every target, the next token's first.

  A token `k` further ahead counts only in the same packed document.
  """
  weights = [batch.weights]
  for k in range(1, depth + 1):
    same = batch.segments == shift_left(batch.segments, k)
    weights.append(shift_left(batch.weights, k) * same * (batch.segments > 0))
  return jnp.stack(weights)


def batch_totals(batch: Batch, depth: int) -> Totals:
  """Counts the targets of a batch [B, T] at every depth, and its rows."""
  targets = jnp.sum(target_weights(batch, depth), axis=(1, 2))
  return Totals(jnp.maximum(targets, 1.0), batch.tokens.shape[0])


def batch_context(
  batch: Batch,
  rules: Rules,
  step: jax.Array | None = None,
  key: jax.Array | None = None,
  parallel: ContextParallel = Ring(),
) -> Context:
  """Returns what the layers need to know about a batch [B, T], whose tokens it puts in their order.

  Args:
    batch: tokens in the order of the row.
    rules: how activations are laid out over the mesh.
    step: scalar int32 training step, or None.
    key: random key of the step's noise, or None.
    parallel: says in which order devices that share a row hold its tokens.
  """
  order, devices = parallel.order, sequence_devices(rules)
  return Context(
    tokens=arrange(batch.tokens, order, devices),
    positions=arrange(batch.positions, order, devices),
    segments=arrange(batch.segments, order, devices),
    media=batch.media,
    placeholders=batch.placeholders,
    step=step,
    key=key,
    rules=rules,
    parallel=parallel,
  )


def arranged_targets(batch: Batch, depth: int, context: Context) -> tuple[jax.Array, jax.Array]:
  """Returns the targets [1 + depth, B, T] int32 of every depth and their weights, float32.

  What is ahead of a token is found in the order of the row; the result lies as the context's
  tokens do.
  """
  targets = jnp.stack([shift_left(batch.targets, k) for k in range(depth + 1)])
  order, devices = context.parallel.order, sequence_devices(context.rules)
  weights = target_weights(batch, depth)
  return arrange(targets, order, devices, axis=2), arrange(weights, order, devices, axis=2)


def training_loss(
  decoder: Decoder,
  variables: dict[str, Any],
  batch: Batch,
  totals: Totals,
  mtp_weight: jax.Array,
  context: Context,
  chunk: int,
  scale: jax.Array | None = None,
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
  """Returns a microbatch's share of the loss, and what it observed.

  Args:
    decoder: the model.
    variables: `params` and `buffers`.
    batch: [B, T] microbatch, in the order of the row.
    totals: divisors of the whole batch.
    mtp_weight: [] weight λ of the mean MTP loss.
    context: facts about the microbatch, from `batch_context`.
    chunk: positions of each row whose logits exist at once.
    scale: [] float32 factor on what is differentiated, or None; see `core.loss_scale`.

  Returns:
    The scalar to differentiate; a dict of scalars that add up over microbatches (`loss` and
    `mtp_loss` in nats a token, `auxiliary_loss`); and the collection `observed`.
  """
  (hiddens, head), reported = decoder.apply(
    variables,
    context,
    method=_every_depth,
    mutable=['losses', 'observed'],
    rngs={} if context.key is None else {'noise': context.key},
  )
  depth = len(hiddens) - 1
  (targets, weights), divisors = arranged_targets(batch, depth, context), totals.targets
  if scale is not None:
    # The vocabulary loss makes, and rounds, its gradient in the forward pass, before any factor
    # from outside reaches it: there the targets' weights must carry the scale already.
    weights *= (scale / divisors)[:, None, None]
    divisors = jnp.full_like(divisors, scale)
  with jax.named_scope('vocabulary_loss'):
    sums = [
      cross_entropy(hidden, head, targets[k], weights[k], chunk, context)
      for k, hidden in enumerate(hiddens)
    ]
  losses = [total / divisors[k] for k, total in enumerate(sums)]
  auxiliary = sum((jnp.sum(x) for x in jax.tree.leaves(reported.get('losses', {}))), jnp.float32(0))
  auxiliary /= totals.rows
  mtp = sum(losses[1:], jnp.float32(0)) / max(depth, 1)
  total = losses[0] + mtp_weight * mtp + auxiliary
  if scale is not None:
    total *= scale
  scalars = {'loss': losses[0], 'auxiliary_loss': auxiliary}
  if depth:
    scalars['mtp_loss'] = mtp
  return total, (scalars, reported.get('observed', {}))


def _every_depth(module: Decoder, context: Context) -> tuple[list[jax.Array], jax.Array]:
  """Returns hidden states [B, T, D], the next token's first, and the output matrix [D, V]."""
  return module.every_depth(context), module.head_matrix()


def evaluation_sums(
  decoder: Decoder, variables: dict[str, Any], batch: Batch, context: Context, chunk: int
) -> dict[str, jax.Array]:
  """Returns sums over a batch [B, T], which add up over batches.

  Returns:
    `nats` and `targets`, [] float32, of the next token; `correct`, [], how many of the targets
    are the token that the model finds likeliest. With MTP also `mtp_nats` and
    `mtp_targets`, [depth], of the tokens beyond; and `accepted`, []: how many of the first depth's
    targets are proposed right, that is, where its likeliest token is the one that the model itself
    finds likeliest a place later. Both read the text as it is, not what they chose.
  """
  found: Any = decoder.apply(variables, context, method=_every_depth)
  hiddens, head = found
  depth = len(hiddens) - 1
  wanted, weights = arranged_targets(batch, depth, context)
  nats, chosen = zip(
    *(
      choice(hidden, head, wanted[k], weights[k], chunk, context)
      for k, hidden in enumerate(hiddens)
    ),
    strict=True,
  )
  targets = jnp.sum(weights, axis=(1, 2))
  correct = jnp.sum((chosen[0] == wanted[0]) * weights[0])
  sums = {'nats': nats[0], 'targets': targets[0], 'correct': correct}
  if depth:
    rules, parallel = context.rules, context.parallel
    later = in_order(shift_left, chosen[0], 1, rules=rules, parallel=parallel)
    sums |= {
      'mtp_nats': jnp.stack(nats[1:]),
      'mtp_targets': targets[1:],
      'accepted': jnp.sum((later == chosen[1]) * weights[1]),
    }
  return sums
