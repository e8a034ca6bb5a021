"""The hash router: the table decides, and is right before anything runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override
from deepseek_jax.layers.moe.interface import Limits
from deepseek_jax.layers.moe.router.hash import Hash
from deepseek_jax.layers.moe.router.table import (
  ByFrequency,
  Random,
  TableFile,
  spread_by_frequency,
)

V, E, K = 11, 6, 3


def oracle(scores, table, tokens, allowed, count):
  """Experts and weights of each token; what may not be chosen gives way to the next number."""
  experts, weights = [], []
  for row, token in enumerate(tokens):
    order = table[token].tolist()
    order += [e for e in ((order[0] + i) % E for i in range(E)) if e not in order]
    chosen = [e for e in order if e in allowed][: min(K, count)]
    total = sum(scores[row, e] for e in chosen)
    rest = K - len(chosen)
    experts.append(chosen + [E] * rest)
    weights.append([1.5 * scores[row, e] / total for e in chosen] + [0.0] * rest)
  return experts, weights


@pytest.mark.parametrize('limits', [None, (range(6), 3), ([0, 2, 5], 3), (range(6), 2), ([1], 3)])
def test_equals_the_oracle(setup, limits):
  variables, x, context, apply = setup(Hash(vocab=V), E, K)
  table = np.asarray(variables['buffers']['table'])
  assert table.dtype == np.int32
  assert table.shape == (V, K)
  assert len({tuple(row) for row in table.tolist()}) > V // 2
  assert all(len(set(row)) == K for row in table.tolist())
  logits = x.reshape(-1, 4).astype(np.float64) @ np.asarray(variables['params']['weight'])
  scores = np.sqrt(np.log(1 + np.exp(logits)))
  allowed, count = limits or (range(E), K)
  given = None
  if limits is not None:
    given = Limits(allowed=jnp.isin(jnp.arange(E), jnp.array(allowed)), top_k=jnp.int32(count))
  got = apply(variables, x, context, given)
  experts, weights = oracle(scores, table, context.tokens.ravel(), allowed, count)
  np.testing.assert_array_equal(got.experts, experts)
  np.testing.assert_allclose(got.weights, weights, rtol=1e-5)


def test_golden_weights_come_from_the_scores(packed):
  i = np.arange(1, 17)
  chosen = [13, 7, 0, 1, 6, 12]
  variables = {
    'params': {'weight': 2 * np.sin(i)[None].astype(np.float32)},
    'buffers': {'table': np.tile(np.int32(chosen), (3, 1))},
  }
  context = packed(1, 1, vocab=3)
  got = Hash(vocab=3).build(16, 6).apply(variables, jnp.ones((1, 1, 1)), context)
  np.testing.assert_array_equal(got.experts, [chosen])
  want = [[0.272042, 0.271900, 0.254939, 0.262767, 0.233292, 0.205060]]
  np.testing.assert_allclose(got.weights, want, atol=1e-6)


def test_frequent_tokens_are_spread():
  rng = np.random.default_rng(0)
  counts = np.floor(1e4 / (1 + rng.permutation(500))).astype(np.int64)
  counts[-20:] = 0
  table = spread_by_frequency(counts, 8, 2)
  assert all(a != b for a, b in table.tolist())
  loads, tokens = np.zeros(8), np.zeros(8)
  for token, row in enumerate(table):
    loads[row] += counts[token]
    tokens[row] += 1
  assert loads.max() / loads.mean() < 1.01, 'no token has a share near 2 / 8'
  assert np.all(tokens > 0)
  # Drawn at random, with the same counts, the busiest expert is far above the mean.
  drawn = Random().draw(jax.random.key(0), 500, 8, 2)
  random_loads = np.zeros(8)
  for token, row in enumerate(np.asarray(drawn)):
    random_loads[row] += counts[token]
  assert random_loads.max() / random_loads.mean() > 1.1


def test_frequencies_from_a_file_or_as_numbers(tmp_path):
  counts = np.arange(V) ** 2
  np.save(tmp_path / 'counts.npy', counts)
  tables = [
    ByFrequency(counts=given).draw(jax.random.key(0), V, E, K)
    for given in (str(tmp_path / 'counts.npy'), tuple(counts.tolist()))
  ]
  np.testing.assert_array_equal(tables[0], spread_by_frequency(counts, E, K))
  np.testing.assert_array_equal(tables[0], tables[1])


@pytest.mark.parametrize(
  ('content', 'text'),
  [
    (None, 'No such file'),
    (b'no array', r'\[264, 2\] whole numbers'),
    (np.zeros((264, 3), np.int32), r'found int32\[264, 3\], expected \[264, 2\]'),
    (np.zeros((264, 2), np.float32), r'found float32\[264, 2\]'),
    (np.full((264, 2), [0, 8]), 'found expert 8 for token 0, expected 0 to 7'),
    (np.full((264, 2), [3, 3]), r'found \[3, 3\] for token 0, expected different'),
  ],
)
def test_a_bad_file_is_named_before_anything_runs(tmp_path, content, text):
  path = tmp_path / 'table.npy'
  if isinstance(content, bytes):
    path.write_bytes(content)
  elif content is not None:
    np.save(path, content)
  router = Hash(vocab=264, table=TableFile(path=str(path)))
  experiment, _ = override(tiny_mla.get_config(), {'model.feed_forward.router': router})
  (error,) = experiment.check(1)
  assert error.startswith(f'model: feed_forward.router Hash: table: {path}: ')
  with pytest.raises(ConfigError, match=text):
    raise ConfigError([error])
  # Where the table is only asked for its shape, as for a trained model, the file need not be.
  table = jax.eval_shape(lambda key: router.table.draw(key, 264, 8, 2), jax.random.key(0))
  assert table.shape == (264, 2)


def test_bad_counts_and_a_wrong_vocabulary(tmp_path):
  config = tiny_mla.get_config()
  for router, text in (
    (Hash(vocab=263), '`vocab` is 263, but the model has 264 tokens'),
    (Hash(vocab=264, table=ByFrequency(counts=(1.0, 2.0))), r'float64[2], expected [264]'),
    (Hash(vocab=264, table=ByFrequency(counts=(-1.0,) * 264)), 'below 0'),
    (Hash(vocab=264, table=ByFrequency(counts=str(tmp_path / 'x.npy'))), 'x.npy: expected'),
  ):
    experiment, _ = override(config, {'model.feed_forward.router': router})
    (error,) = experiment.check(1)
    assert text in error
  with pytest.raises(ConfigError, match='vocab'):
    Hash(vocab=0)
