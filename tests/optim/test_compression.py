"""Sums over replicas in few bits, against NumPy; error feedback; what travels, by count."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.core.config import ConfigError
from deepseek_jax.formats import int4, int8
from deepseek_jax.optim.compression import ErrorFeedback, Exact, Quantised, buckets, sum_tree
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh

REPLICAS = 4
BLOCK = 6
SHAPES = {'stack/segment_0/a': (3, 5), 'stack/segment_0/b': (7,), 'head': (2, 4, 11), 'norm': (1,)}


def gradients(seed: int) -> dict[str, np.ndarray]:
  """Of every replica, [R, ...], of very different sizes from array to array and row to row."""
  generator = np.random.default_rng(seed)
  return {
    name: (
      generator.standard_normal((REPLICAS, *shape)) * 10.0 ** generator.integers(-2, 3, shape)
    ).astype(np.float32)
    for name, shape in SHAPES.items()
  }


@functools.cache
def program(kind):
  """`(tree of [R, ...]) -> (sums and errors, both [R, ...])`: what every replica has of them."""
  mesh = make_mesh(MeshConfig(replica=REPLICAS, data=2), jax.devices())

  def one(tree):
    found = sum_tree(kind, {name: leaf[0] for name, leaf in tree.items()}, 'replica')
    return jax.tree.map(lambda x: x[None], found)

  def run(tree):
    lies = P('replica')
    return jax.shard_map(one, in_specs=(lies,), out_specs=lies, check_vma=False)(tree)

  with jax.set_mesh(mesh):
    compiled = jax.jit(run).lower(gradients(0)).compile()

  def call(tree):
    put = jax.device_put(tree, jax.NamedSharding(mesh, P('replica')))
    return jax.device_get(compiled(put))

  return call


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
  """What a message of [n] would give back; `BLOCK` divides n."""
  blocks = x.astype(np.float64).reshape(-1, BLOCK)
  step = np.abs(blocks).max(axis=1, keepdims=True) / {8: 127, 4: 7}[bits]
  return (np.rint(blocks / np.where(step == 0, 1, step)) * step).reshape(-1)


def oracle(tree: dict[str, np.ndarray], bits: int) -> dict[str, np.ndarray]:
  """The sums, one array and one block at a time: rounded by each, added up, rounded again."""
  found = {}
  for name, leaf in tree.items():
    flat = leaf.reshape(REPLICAS, -1)
    padded = np.pad(flat, ((0, 0), (0, -flat.shape[1] % BLOCK)))
    total = rounded(sum(rounded(row, bits) for row in padded), bits)
    found[name] = total[: flat.shape[1]].reshape(leaf.shape[1:])
  return found


@pytest.mark.parametrize('bits', [8, 4])
def test_sums_are_the_oracles(bits):
  """The same on every replica to the last bit; within a rounding of float32 of the oracle."""
  tree = gradients(1)
  sums, errors = program(Quantised(bits=bits, block=BLOCK))(tree)
  expected = oracle(tree, bits)
  levels = {8: 127, 4: 7}[bits]
  for name, leaf in sums.items():
    assert all(np.array_equal(leaf[0], other) for other in leaf[1:]), name
    largest = np.abs(tree[name]).sum(axis=0).max()
    difference = np.abs(leaf[0] - expected[name])
    # float32 and float64 may go two ways at a tie: then it is one step.
    assert np.mean(difference <= 1e-5 * largest) > 0.95, name
    # Half a step from each replica on the way there, and half of one of the sum on the way back.
    bound = 0.5 / levels * (np.abs(tree[name]).reshape(REPLICAS, -1).max(axis=1).sum() + largest)
    assert np.abs(leaf[0] - tree[name].sum(axis=0)).max() <= 1.02 * bound, name
    # What is missing from the sum is what the replicas say was lost.
    missing = tree[name].astype(np.float64).sum(axis=0) - leaf[0]
    np.testing.assert_allclose(errors[name].sum(axis=0), missing, atol=2e-6 * largest)
    assert np.abs(missing).max() > 0, name


def test_exact_is_the_sum():
  """In float32, with no errors."""
  tree = gradients(2)
  sums, errors = program(Exact())(tree)
  for name, leaf in sums.items():
    np.testing.assert_allclose(leaf[0], tree[name].sum(axis=0), rtol=1e-6, atol=1e-4)
    assert not np.any(errors[name])


def test_what_can_be_sent_is_sent_exactly():
  """Integers that rounding leaves alone come back as they are, in every shape and place."""
  generator = np.random.default_rng(0)
  tree = {
    name: generator.integers(-1, 2, (REPLICAS, *shape)).astype(np.float32)
    for name, shape in SHAPES.items()
  }
  for leaf in tree.values():
    # Sums of one sign at least 1: every block's largest is 1 there, and a whole number back.
    leaf[...] = np.abs(leaf[:1])
  sums, errors = program(Quantised(bits=8, block=BLOCK))(tree)
  for name, leaf in sums.items():
    np.testing.assert_allclose(leaf[0], tree[name].sum(axis=0), rtol=1e-6)
    assert np.abs(errors[name]).max() < 1e-6


@pytest.mark.parametrize(('bits', 'gain'), [(8, 15), (4, 15)])
def test_feedback_makes_the_running_sum_unbiased(bits, gain):
  """After 40 exchanges of one gradient the sum is off by one exchange's error, not by 40."""
  run, tree, rounds = program(Quantised(bits=bits, block=BLOCK)), gradients(3), 40
  exact = {name: rounds * leaf.astype(np.float64).sum(axis=0) for name, leaf in tree.items()}
  offs = []
  for decay in (1.0, 0.0):
    errors = {name: np.zeros_like(leaf) for name, leaf in tree.items()}
    received = {name: np.zeros(leaf.shape[1:]) for name, leaf in tree.items()}
    for _ in range(rounds):
      sums, errors = run({name: leaf + decay * errors[name] for name, leaf in tree.items()})
      received = {name: total + sums[name][0] for name, total in received.items()}
    off = np.concatenate([np.ravel(received[name] - exact[name]) for name in tree])
    offs.append(np.abs(off).mean())
    if decay:
      left = np.concatenate([np.ravel(errors[name].sum(axis=0)) for name in tree])
      np.testing.assert_allclose(off, -left, atol=1e-4 * np.abs(left).max() + 1e-3)
  assert offs[1] > gain * offs[0]


def test_faults_stay_visible():
  """A gradient that is not finite makes its block's sum NaN on every replica, not a number."""
  tree = gradients(4)
  for bits in (8, 4):
    for bad in (np.nan, np.inf):
      broken = {name: leaf.copy() for name, leaf in tree.items()}
      broken['head'][2, 0, 1, 3] = bad
      sums, _ = program(Quantised(bits=bits, block=BLOCK))(broken)
      assert np.isnan(sums['head'][:, 0, 1, 3]).all()
      assert np.isfinite(sums['norm']).all()
      assert np.isfinite(sums['stack/segment_0/a']).all()


def test_bytes():
  """Counted by hand: blocks of 128 of 1,000 elements are 8, 4 for each of two replicas."""
  sizes = [900, 100]
  assert Exact().sent_bytes(sizes, 2) == 4000
  # ⌈900 / 128⌉ + ⌈100 / 128⌉ = 9 blocks, 5 a replica; there and back.
  assert Quantised(bits=8).sent_bytes(sizes, 2) == 2 * 5 * (128 + 4)
  assert Quantised(bits=4).sent_bytes(sizes, 2) == 2 * 5 * (64 + 4)
  large = [10**7]
  exact = Exact().sent_bytes(large, 4)
  assert exact / Quantised(bits=8).sent_bytes(large, 4) == pytest.approx(
    4 / (1 + 4 / 128), rel=1e-3
  )
  assert exact / Quantised(bits=4).sent_bytes(large, 4) == pytest.approx(
    4 / (0.5 + 4 / 128), rel=1e-3
  )


def test_buckets():
  """A part of the model each, and a segment of the stack each."""
  names = [
    'head/weight',
    'norm/scale',
    'stack/segment_0/a/b',
    'stack/segment_1/a',
    'stack/segment_0/c',
  ]
  assert buckets(names) == {
    'head': ['head/weight'],
    'norm': ['norm/scale'],
    'stack/segment_0': ['stack/segment_0/a/b', 'stack/segment_0/c'],
    'stack/segment_1': ['stack/segment_1/a'],
  }


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Quantised(bits=6), r'Quantised.bits: found 6, expected one of \[4, 8\]'),
    (lambda: Quantised(block=7), r'Quantised.block: found 7, expected an even count'),
    (lambda: ErrorFeedback(decay=0.0), r'ErrorFeedback.decay: found 0.0, expected a share'),
  ],
)
def test_bad_fields(make, message):
  """Refused by name."""
  with pytest.raises(ConfigError, match=message):
    make()


def test_formats_agree_with_their_files():
  """A message unpacks to what the formats decode."""
  from deepseek_jax.ops.compressed_sum import message_bytes, pack, unpack

  x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4 * BLOCK)), jnp.float32)
  for bits, form in ((8, int8), (4, int4)):
    message = pack(x, bits, BLOCK)
    assert message.shape == (3, message_bytes(4 * BLOCK, bits, BLOCK))
    np.testing.assert_array_equal(
      unpack(message, bits, BLOCK), form.decode(form.encode(x, BLOCK), BLOCK)
    )
