"""Held-out figures count every target once, and are what each document alone would give."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.data.cache import TokenCache
from deepseek_jax.data.packed_split import PackedSplit
from deepseek_jax.data.packing import make_plan
from deepseek_jax.layers.context import Context
from deepseek_jax.train.evaluate import Evaluation, bits_per_byte, evaluate
from deepseek_jax.train.step import build_program

LENGTH, ROWS = 24, 4


def split_of(lengths, length=LENGTH, prompts=None):
  """Random documents of some lengths, 3 bytes of text a token; bos 0, eos 1."""
  generator = np.random.default_rng(0)
  offsets = np.concatenate([[0], np.cumsum(lengths)])
  tokens = generator.integers(3, 259, offsets[-1]).astype(np.uint16)
  tokens[offsets[:-1]], tokens[offsets[1:] - 1] = 0, 1
  cache = TokenCache(
    tokens=tokens,
    offsets=offsets,
    text_bytes=3 * np.asarray(lengths),
    given=1 + np.asarray(prompts or [0] * len(lengths)),
    titles=tuple(map(str, range(len(lengths)))),
    sources=('s',) * len(lengths),
    fingerprint='f',
  )
  return PackedSplit(name='heldout', cache=cache, plan=make_plan(offsets, length, 0))


def test_against_every_document_alone():
  """Packing, batching and filling up change nothing: float64 sums, one document after another."""
  # No longer than a row, so that no document is cut. The last batch has rows of padding alone.
  lengths = [25, 2, 9, 14, 20, 3, 25, 11, 6, 17, 22]
  # Some begin with a prompt, whose tokens are read and not counted.
  prompts = [0, 0, 4, 12, 0, 1, 20, 0, 0, 15, 3]
  split = split_of(lengths, prompts=prompts)
  assert split.rows % ROWS
  base = tiny_mla.get_config()
  run = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, depth=1, dense_layers=0),
    data=dataclasses.replace(base.data, length=LENGTH, batch_size=ROWS),
  )
  program = build_program(run, jax.devices()[:1])
  generator = np.random.default_rng(1)
  params, buffers = jax.tree.map(
    lambda leaf: jnp.asarray(generator.normal(0, 0.3, leaf.shape), jnp.float32),
    (program.abstract_state.params, program.abstract_state.buffers),
  )
  found = evaluate(program, params, buffers, split)

  def logits(tokens, segments):
    positions = jnp.arange(LENGTH, dtype=jnp.int32)[None]
    context = Context(tokens=tokens, positions=positions, segments=segments)
    variables = {'params': params, 'buffers': buffers}
    return program.decoder.apply(variables, context, method=lambda m, c: m.logits(m(c)[0], c))

  shape = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
  alone = jax.jit(logits).lower(shape, shape).compile()
  nats, count, right = 0.0, 0, 0
  offsets = split.cache.offsets
  for start, end, prompt in zip(offsets[:-1], offsets[1:], prompts, strict=True):
    document = split.cache.tokens[start:end].astype(np.int32)
    inputs = np.zeros((1, LENGTH), np.int32)
    inputs[0, : len(document) - 1] = document[:-1]
    real = (np.arange(LENGTH) < len(document) - 1).astype(np.int32)[None]
    values = np.asarray(alone(jnp.asarray(inputs), jnp.asarray(real))[0], np.float64)
    for place, target in enumerate(document[1:]):
      if place < prompt:
        continue
      row = values[place] - values[place].max()
      nats += np.log(np.exp(row).sum()) - row[target]
      count += 1
      right += int(np.argmax(row)) == target
  assert found.targets == count == split.targets == sum(lengths) - len(lengths) - sum(prompts)
  assert found.loss == pytest.approx(nats / count, rel=1e-5)
  assert found.bits_per_byte == pytest.approx(nats / np.log(2) / (3 * sum(lengths)), rel=1e-5)
  assert right > 0
  assert found.accuracy == pytest.approx(right / count)


class Recorder:
  """A program that counts targets, gives each its token's number as loss, and remembers."""

  def __init__(self, rows):
    """Takes the rows of a batch."""
    self.experiment = types.SimpleNamespace(data=types.SimpleNamespace(batch_size=rows))
    self.own_rows = None
    self.seen = []

  def put(self, batch):
    """Sends rows to the device."""
    return jax.device_put(batch, jax.devices()[0])

  def evaluate(self, params, buffers, batch):
    """Sums the tokens' numbers."""
    assert (params, buffers) == ('params', 'buffers')
    self.seen.append(np.asarray(batch.tokens))
    return {
      'nats': jnp.sum(batch.tokens * batch.weights),
      'targets': jnp.sum(batch.weights),
      'correct': jnp.sum((batch.tokens % 2) * batch.weights),
    }


@pytest.mark.parametrize('batches', [None, 1, 2, 3, 4, 5, 6, 100])
def test_a_subset_of_batches(batches):
  """So many batches as asked for, each another one, from all over the split."""
  split = split_of([25] * 22)
  assert split.rows == 22
  program = Recorder(ROWS)
  found = evaluate(program, 'params', 'buffers', split, batches)
  every = [split.batch(i if i < 22 else -1 for i in range(s, s + ROWS)) for s in range(0, 22, ROWS)]
  chosen = [
    next(n for n, batch in enumerate(every) if np.array_equal(batch.tokens, seen))
    for seen in program.seen
  ]
  expected = {None: 6, 100: 6}.get(batches, batches)
  assert len(chosen) == expected
  assert chosen == sorted(set(chosen))
  # Spread out: the gaps between them differ by one batch at most.
  gaps = np.diff([*chosen, 6])
  assert chosen[0] == 0
  assert np.ptp(gaps) <= 1
  targets = sum(every[n].weights.sum() for n in chosen)
  nats = sum((every[n].tokens * every[n].weights).sum() for n in chosen)
  assert found.targets == targets
  assert found.loss == pytest.approx(nats / targets, rel=1e-6)
  odd = sum(((every[n].tokens % 2) * every[n].weights).sum() for n in chosen)
  assert found.accuracy == pytest.approx(odd / targets)
  # A subset's loss is spread over all bytes at the split's own rate of tokens a byte.
  assert found.bits_per_byte == pytest.approx(
    found.loss / np.log(2) * split.targets / split.text_bytes, rel=1e-6
  )


def test_bits_per_byte():
  """Ln 2 nats a token, 25 tokens with 24 targets, 75 bytes."""
  split = split_of([25])
  assert bits_per_byte(float(np.log(2)), split) == pytest.approx(24 / 75)


def test_nothing_but_what_was_measured():
  """The result is four plain numbers, ready for JSON, where the model looks no further ahead."""
  program = Recorder(1)
  result = evaluate(program, 'params', 'buffers', split_of([3]))
  assert isinstance(result, Evaluation)
  numbers = result.numbers()
  assert list(numbers) == ['loss', 'bits_per_byte', 'targets', 'accuracy']
  assert [type(value) for value in numbers.values()] == [float, float, int, float]


def test_further_ahead():
  """Sums of batches, not means of means; the mean over depths, acceptance of the first."""

  class Ahead(Recorder):
    def evaluate(self, params, buffers, batch):
      sums = super().evaluate(params, buffers, batch)
      first = len(self.seen) == 1
      return sums | {
        'mtp_nats': jnp.array([6.0, 2.0]) if first else jnp.array([2.0, 4.0]),
        'mtp_targets': jnp.array([3.0, 1.0]) if first else jnp.array([1.0, 1.0]),
        'accepted': jnp.float32(2 if first else 1),
      }

  result = evaluate(Ahead(1), 'params', 'buffers', split_of([25, 25]))
  assert result.mtp_loss == pytest.approx((8 / 4 + 6 / 2) / 2)
  assert result.mtp_acceptance == pytest.approx(3 / 4)
  assert all(type(value) in (float, int) for value in result.numbers().values())
