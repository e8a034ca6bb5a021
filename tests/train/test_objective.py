"""The objective against slow sums over tokens, and its parts against the whole."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.moe.balance import SequenceBalance
from deepseek_jax.models.decoder import init_variables
from deepseek_jax.models.mtp import MTP
from deepseek_jax.optim.schedule import MultiStep
from deepseek_jax.sharding.rules import Rules
from deepseek_jax.train import objective
from deepseek_jax.train.gradients import split_rows
from deepseek_jax.train.objective import NextToken

ROWS, LENGTH, VOCAB, DEPTH, CHUNK = 4, 12, 264, 2, 5


def packed() -> Batch:
  """Rows of 12, 3, 9 and 0 places in use; targets are the next tokens of the documents."""
  generator = np.random.default_rng(0)
  shape = (ROWS, LENGTH)
  tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  for row, lengths in enumerate([(7, 5), (2, 1), (1, 8), ()]):
    ends = np.cumsum([0, *lengths])
    for number, length in enumerate(lengths, start=1):
      here = slice(ends[number - 1], ends[number])
      document = generator.integers(3, 259, length + 1)
      tokens[row, here], targets[row, here] = document[:-1], document[1:]
      segments[row, here], positions[row, here] = number, np.arange(length)
  weights = (segments > 0).astype(np.float32)
  return Batch(tokens, targets, weights, positions, segments, segments - 1)


@pytest.fixture(scope='module')
def model():
  """A decoder of one expert layer and two MTP modules, and its variables."""
  base = tiny_mla.get_config().model
  config = dataclasses.replace(
    base,
    depth=1,
    dense_layers=0,
    mtp=MTP(depth=DEPTH),
    feed_forward=dataclasses.replace(base.feed_forward, balance=SequenceBalance(weight=0.5)),
  )
  decoder = config.build()
  shapes = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  generator = np.random.default_rng(1)
  variables = jax.tree.map(
    lambda leaf: generator.normal(0, 0.3, leaf.shape).astype(np.float32),
    jax.tree.map(lambda box: box.value, shapes, is_leaf=lambda leaf: hasattr(leaf, 'names')),
  )
  return decoder, variables


def compiled(function, *arguments):
  """Runs a function, compiled without polish."""
  return jax.jit(function).lower(*arguments).compile()(*arguments)


@pytest.fixture(scope='module')
def loss(model):
  """The loss with what it reports, as one compiled function of (variables, batch, totals, λ)."""
  decoder, variables = model

  def run(variables, batch, totals, weight):
    context = objective.batch_context(batch, Rules())
    whole = objective.Totals(totals, ROWS)
    return objective.training_loss(decoder, variables, batch, whole, weight, context, CHUNK)

  @functools.cache
  def program(rows):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), packed())
    arguments = (variables, abstract, jnp.ones(1 + DEPTH), jnp.float32(0))
    differentiate = jax.value_and_grad(run, has_aux=True)
    return jax.jit(differentiate).lower(*arguments).compile()

  def call(batch, totals, weight):
    batch = jax.tree.map(jnp.asarray, batch)
    return program(len(batch.tokens))(variables, batch, totals, jnp.float32(weight))

  return call


def slow_targets(batch):
  """(row, place, depth) of every target, by walking each document."""
  for row in range(ROWS):
    for place in range(LENGTH):
      for depth in range(DEPTH + 1):
        inside = place + depth < LENGTH and batch.segments[row, place] > 0
        if inside and batch.segments[row, place + depth] == batch.segments[row, place]:
          yield row, place, depth


def test_target_weights():
  """A token further ahead counts only where its document goes on."""
  batch = packed()
  expected = np.zeros((DEPTH + 1, ROWS, LENGTH))
  for row, place, depth in slow_targets(batch):
    expected[depth, row, place] = 1
  np.testing.assert_array_equal(objective.target_weights(batch, DEPTH), expected)
  totals = objective.batch_totals(batch, DEPTH)
  # Documents of 7, 5, 2, 1, 1 and 8 inputs lose one target a depth each, while they have any.
  np.testing.assert_array_equal(totals.targets, [24, 18, 14])
  assert totals.rows == ROWS


def test_weights_are_not_only_zeros_and_ones():
  """The weight of a target is that of the place where it is the next token."""
  batch = packed()
  batch = batch.replace(weights=batch.weights * np.linspace(0.5, 1.5, LENGTH, dtype=np.float32))
  weights = objective.target_weights(batch, DEPTH)
  for row, place, depth in slow_targets(batch):
    assert weights[depth, row, place] == batch.weights[row, place + depth]


def test_totals_of_no_target():
  """A batch of padding divides by one, not by zero."""
  batch = packed()
  empty = jax.tree.map(np.zeros_like, batch)
  np.testing.assert_array_equal(objective.batch_totals(empty, 1).targets, [1, 1])


@pytest.fixture(scope='module')
def every_logit(model):
  """Logits [1 + depth, B, T, V] of the packed rows in float64, and the layers' losses."""
  decoder, variables = model

  def logits(variables):
    def forward(module, context):
      every = module.every_depth(context)
      return jnp.stack([module.logits(h, context) for h in every])

    context = objective.batch_context(jax.tree.map(jnp.asarray, packed()), Rules())
    return decoder.apply(variables, context, method=forward, mutable=['losses'])

  values, reported = compiled(logits, variables)
  return np.asarray(values, np.float64), reported


def test_loss_against_slow_sums(every_logit, loss):
  """Every target's log-probability in float64, by hand, at every depth."""
  values, reported = every_logit
  batch, weight = packed(), 0.3
  top = values.max(axis=-1, keepdims=True)
  log_probability = values - top - np.log(np.exp(values - top).sum(axis=-1, keepdims=True))
  nats, counts = np.zeros(DEPTH + 1), np.zeros(DEPTH + 1)
  for row, place, depth in slow_targets(batch):
    nats[depth] -= log_probability[depth, row, place, batch.targets[row, place + depth]]
    counts[depth] += 1
  expected = nats / counts
  # Three balance losses, one a layer with experts, each a sum over rows.
  balances = [float(x) for x in jax.tree.leaves(reported['losses'])]
  assert len(balances) == 1 + DEPTH
  assert min(balances) > 0
  auxiliary = sum(balances) / ROWS

  totals = objective.batch_totals(batch, DEPTH)
  (total, (scalars, observed)), _ = loss(batch, totals.targets, weight)
  assert scalars['loss'] == pytest.approx(expected[0], rel=1e-6)
  assert scalars['mtp_loss'] == pytest.approx(expected[1:].mean(), rel=1e-6)
  assert scalars['auxiliary_loss'] == pytest.approx(auxiliary, rel=1e-6)
  assert total == pytest.approx(expected[0] + weight * expected[1:].mean() + auxiliary, rel=1e-6)
  # Each layer routed every real token to two experts, padding to none that count.
  for load in jax.tree.leaves(observed):
    assert load.sum() == 2 * 24


def test_evaluation_against_slow_sums(model, every_logit):
  """Nats of every depth, and how often the second token's proposal is what the model chooses."""
  decoder, variables = model
  batch = packed()
  values, _ = every_logit
  top = values.max(axis=-1, keepdims=True)
  log_probability = values - top - np.log(np.exp(values - top).sum(axis=-1, keepdims=True))
  nats, counts, accepted = np.zeros(DEPTH + 1), np.zeros(DEPTH + 1), 0
  for row, place, depth in slow_targets(batch):
    nats[depth] -= log_probability[depth, row, place, batch.targets[row, place + depth]]
    counts[depth] += 1
    if depth == 1:
      accepted += values[1, row, place].argmax() == values[0, row, place + 1].argmax()

  def run(variables):
    parts = jax.tree.map(jnp.asarray, batch)
    context = objective.batch_context(parts, Rules())
    return objective.evaluation_sums(decoder, variables, parts, context, CHUNK)

  sums = compiled(run, variables)
  assert sums['nats'] == pytest.approx(nats[0], rel=1e-6)
  assert sums['targets'] == counts[0]
  np.testing.assert_allclose(sums['mtp_nats'], nats[1:], rtol=1e-6)
  np.testing.assert_array_equal(sums['mtp_targets'], counts[1:])
  assert sums['accepted'] == accepted


def test_parts_add_up(loss):
  """The shares of microbatches sum to the whole: loss, reports and gradients."""
  batch = packed()
  totals = objective.batch_totals(batch, DEPTH).targets
  whole = loss(batch, totals, 0.7)
  parts = split_rows(batch, 2)
  shares = [loss(jax.tree.map(lambda x, i=i: x[i], parts), totals, 0.7) for i in range(2)]
  one, other = (float(total) for (total, _), _ in shares)
  assert one != pytest.approx(other, rel=0.1)
  total = jax.tree.map(jnp.add, *shares)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
    total,
    whole,
  )


def test_gradients_pass_the_bias_by(loss):
  """The selection bias decides who is chosen, and the loss does not flow through a decision."""
  batch = packed()
  totals = objective.batch_totals(batch, DEPTH).targets
  _, gradients = loss(batch, totals, 0.3)
  biases = jax.tree.leaves(gradients['buffers'])
  assert len(biases) == 1 + DEPTH
  assert not any(np.any(bias) for bias in biases)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients['params']))


def test_mtp_weight():
  """The peak times its schedule: 0.3 for two thirds of the run, then 0.1."""
  kind = NextToken(
    mtp_weight=0.3, mtp_schedule=MultiStep(warmup_steps=0, boundaries=(2 / 3,), factor=1 / 3)
  )
  weight = kind.build(9)
  found = [float(weight(step)) for step in range(9)]
  np.testing.assert_allclose(found, [0.3] * 6 + [0.1] * 3, rtol=1e-6)


def test_faults():
  """All at once."""
  with pytest.raises(ConfigError) as caught:
    NextToken(mtp_weight=-1.0, chunk=0)
  assert caught.value.messages == (
    '`mtp_weight` is -1.0; expected 0 or more',
    '`chunk` is 0; expected 1 or more positions',
  )
