"""Rows of a batch by host; real hosts are in tests/processes."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.sharding.host_rows import fetch, own_rows, put_rows, put_whole
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh


class Hosts:
  """A sharding over eight devices as one of several hosts sees it."""

  is_fully_addressable = False

  def __init__(self, sharding, devices):
    """Shows the devices of a host only."""
    self.sharding, self.devices = sharding, devices

  def addressable_devices_indices_map(self, shape):
    """As JAX has it."""
    found = self.sharding.devices_indices_map(shape)
    return {device: index for device, index in found.items() if device in self.devices}


def host(sharding, number, hosts):
  """What host `number` of some sees."""
  each = len(jax.devices()) // hosts
  return Hosts(sharding, jax.devices()[number * each : (number + 1) * each])


def batch_sharding(spec=('data', 'seq'), **axes):
  """A sharding of [B, T]."""
  return NamedSharding(make_mesh(MeshConfig(**axes)), PartitionSpec(*spec))


@pytest.mark.parametrize(
  ('axes', 'rows'),
  [
    ({'data': 8}, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]),
    ({'data': 4, 'seq': 2}, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]),
    # Sequence, model and stage span hosts: these read the same rows.
    ({'data': 2, 'seq': 4}, [[*range(8)], [*range(8)], [*range(8, 16)], [*range(8, 16)]]),
    ({'data': 1, 'model': 8}, [[*range(16)]] * 4),
    ({'data': 4, 'stage': 2}, [[*range(8)], [*range(8, 16)]] * 2),
  ],
)
def test_a_host_reads_the_rows_of_its_devices(axes, rows):
  sharding = batch_sharding(**axes)
  found = [own_rows(host(sharding, number, 4), (16, 8)).tolist() for number in range(4)]
  assert found == rows


def test_one_host_reads_all():
  assert own_rows(batch_sharding(), (16, 8)) is None


def test_put_rows_takes_rows_that_are_not_neighbours():
  """With rows given, arrays are put together from what is there; all devices are here."""
  sharding = batch_sharding(('data',), data=8)
  whole = np.arange(16 * 3).reshape(16, 3)
  found = put_rows({'a': whole}, sharding, 16, np.arange(16))['a']
  np.testing.assert_array_equal(found, whole)
  assert found.sharding == sharding
  split = batch_sharding(('data', 'seq'), data=2, seq=4)
  np.testing.assert_array_equal(
    put_rows(whole[:, :2].repeat(4, 1), split, 16, None)[3], [9] * 4 + [10] * 4
  )


def test_put_whole_and_fetch():
  sharding = batch_sharding(('data',), data=8)
  array = put_whole(np.arange(16), sharding)
  assert array.sharding == sharding
  np.testing.assert_array_equal(fetch(array), np.arange(16))


def test_hosts_get_equal_shares_of_targets(tmp_path):
  """Rows are packed, and shuffled over the whole corpus: no host has less to learn from."""
  text = tmp_path / 'text'
  text.mkdir()
  generator = np.random.default_rng(0)
  words = 'the ship and the sea and the whale of the north wind'.split()
  for number in range(300):
    count = int(generator.integers(3, 120))
    (text / f'{number}.txt').write_text(' '.join(generator.choice(words, count)) + f' {number}\n')
  from deepseek_jax.data.source import TextFiles

  corpus = TextCorpus(
    source=TextFiles(f'{text}/*.txt'), tokenizer=Bytes(), length=64, batch_size=16
  )
  data = corpus.prepare(tmp_path / 'cache')
  sharding = batch_sharding(data=8)
  everyone = [own_rows(host(sharding, number, 4), (16, 64)) for number in range(4)]
  streams = [data.train_batches(3, rows) for rows in everyone]
  whole = data.train_batches(3)
  targets = np.zeros(4)
  for _ in range(40):
    parts = [next(stream) for stream in streams]
    targets += [part.weights.sum() for part in parts]
    # Together they are the batch that one host would have read.
    np.testing.assert_array_equal(np.concatenate([p.tokens for p in parts]), next(whole).tokens)
  assert targets.max() / targets.min() < 1.05
