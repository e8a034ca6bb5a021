"""Window, heavy and sparse compression: caches, packed documents, and rows in blocks."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.csa import CSA, CSAttention
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.context import Context, packed_context
from deepseek_jax.ops.attention import compressed

SIZES = {
  'heads': 2,
  'head_dim': 8,
  'rope_dim': 4,
  'query_latent': 6,
  'groups': 2,
  'group_dim': 3,
  'window': 5,
}
KINDS = {
  'window': SharedWindow(**SIZES),
  'hca': HCA(**SIZES, ratio=8),
  'csa': CSA(**SIZES, ratio=4, top_k=3, index_heads=16, index_dim=6),
}
WIDTH, LENGTH = 7, 45


@functools.cache
def variables(name):
  """Weights away from their start, sinks and position biases among them."""
  module = KINDS[name].build()
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), np.zeros((1, 2, WIDTH), np.float32), packed_context([(2,)], 2)
  )
  rng = np.random.default_rng(4)

  def draw(path, leaf):
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    if path[-1].key == 'scale':
      return 1 + 0.3 * noise
    return noise if leaf.ndim == 1 or 'bias' in path[-1].key else noise / leaf.shape[0] ** 0.5

  drawn = jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(shapes))
  return jax.tree.map(jnp.asarray, drawn)


def compiled(name, *arguments):
  """The layer compiled for (x, context) or (x, context, cache), for CPU time's sake quickly."""
  given = (variables(name), *arguments)
  run = jax.jit(KINDS[name].build().apply).lower(*given).compile()
  return functools.partial(run, variables(name))


X = np.random.default_rng(1).standard_normal((2, LENGTH, WIDTH)).astype(np.float32)


@pytest.mark.parametrize('name', KINDS)
def test_decode_equals_forward(name):
  """In chunks of 7 and then token by token; the second row waits with what is in its memory."""
  context = packed_context([(LENGTH,), (LENGTH,)])
  want = np.asarray(compiled(name, X, context)(X, context)[0])
  cache = KINDS[name].empty_cache(2, LENGTH, jnp.float32)
  runs = {}
  start = np.zeros(2, np.int32)
  checked = 0
  while start.min() < LENGTH:
    # Rows get unequal counts of tokens; from token 35 on, one each.
    size = 7 if start.min() < 35 else 1
    counts = np.minimum([size, 1 + size // 2 if size > 1 else 1], LENGTH - start)
    positions = start[:, None] + np.arange(size, dtype=np.int32)
    real = np.arange(size) < counts[:, None]
    at = np.minimum(positions, LENGTH - 1)
    x = np.where(real[..., None], np.take_along_axis(X, at[..., None], axis=1), 9.0)
    part = Context(tokens=at, positions=positions, segments=real.astype(np.int32))
    x = x.astype(np.float32)
    if size not in runs:
      runs[size] = compiled(name, x, part, cache)
    got, cache = runs[size](x, part, cache)
    for row, t in zip(*np.nonzero(real)):
      np.testing.assert_allclose(got[row, t], want[row, positions[row, t]], rtol=1e-4, atol=2e-5)
      checked += 1
    start = start + counts.astype(np.int32)
  assert checked == 2 * LENGTH


@pytest.mark.parametrize('name', KINDS)
def test_packed_documents_in_blocks(name, monkeypatch):
  """A row of documents, in blocks of 8 queries, is each document by itself in one block.

  Forward and gradient: blocks of tokens are counted within a document.
  """
  lengths = (13, 1, 22)
  packed = packed_context([lengths, (LENGTH,)])
  alone = packed_context([(size,) for size in lengths] + [(LENGTH,)])
  ends = np.cumsum(lengths)
  rows = np.zeros((4, LENGTH, WIDTH), np.float32)
  for row, (end, size) in enumerate(zip(ends, lengths)):
    rows[row, :size] = X[0, end - size : end]
  rows[3] = X[1]
  pull = np.sin(np.arange(LENGTH * WIDTH, dtype=np.float32)).reshape(LENGTH, WIDTH)
  module = KINDS[name].build()

  def both(*given):
    def loss(x, weights, context, pull):
      out, _ = module.apply(weights, x, context)
      return jnp.sum(out * pull), out

    given = (given[0], variables(name), *given[1:])
    run = jax.jit(jax.grad(loss, has_aux=True)).lower(*given).compile()
    return [np.asarray(y) for y in run(*given)]

  pulls = np.zeros_like(rows)
  for row, (end, size) in enumerate(zip(ends, lengths)):
    pulls[row, :size] = pull[end - size : end]
  pulls[3] = pull
  want = both(rows, alone, pulls)
  monkeypatch.setattr(compressed, 'BLOCK', 8)
  pull = np.stack([pull, pull])
  pull[0, ends[-1] :] = 0
  got = both(X, packed, pull)
  for a, b in zip(got, want, strict=True):
    assert np.isfinite(a).all()
    for row, (end, size) in enumerate(zip(ends, lengths)):
      np.testing.assert_allclose(a[0, end - size : end], b[row, :size], rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(a[1], b[3], rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_the_indexer_learns_what_attention_does():
  """Its loss is the KL from the attention to the chosen entries, and moves its weights alone."""
  context = packed_context([(LENGTH,), (20, 9)])
  module, given = KINDS['csa'].build(), variables('csa')

  def loss(variables):
    (_, reported) = module.apply(variables, X, context, mutable=['losses'])
    return sum(jnp.sum(part) for part in jax.tree.leaves(reported))

  before, grads = jax.jit(jax.value_and_grad(loss))(given)
  assert before > 0.1
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    indexer = any(part.key.startswith('index_') for part in path)
    assert (np.abs(leaf).max() > 1e-6) == indexer, path
  step = jax.tree.map(lambda p, g: p - 0.01 * g, given, grads)
  assert loss(step) < before
  silent = dataclasses.replace(KINDS['csa'], index_loss=0).build()
  assert not silent.apply(given, X, context, mutable=['losses'])[1]


def test_attention_to_chosen_entries():
  """What attention to entries sums to, over heads, by one softmax a query."""
  config = CSA(**SIZES, ratio=5, top_k=3, index_heads=2, index_dim=6)
  rng = np.random.default_rng(0)
  context = packed_context([(LENGTH,)])
  query = rng.standard_normal((1, LENGTH, 2, 8)).astype(np.float32)
  keys = rng.standard_normal((1, LENGTH, 8)).astype(np.float32)
  rows = rng.standard_normal((1, 9, 8)).astype(np.float32)
  ends = np.arange(9)[None] * 5 + 4
  indices = np.sort(np.argsort(rng.random((1, LENGTH, 9)), axis=-1)[..., :3], axis=-1)
  indices = np.where(
    np.take_along_axis(ends[:, None], indices, 2) <= np.arange(LENGTH)[None, :, None], indices, -1
  )
  sinks = np.array([0.3, -0.2], np.float32)
  _, mass = nn.apply(CSAttention.attend_chosen, config.build())(
    {},
    query,
    context,
    compressed.Keys(keys, context.positions, context.segments),
    compressed.Keys(rows, ends, np.ones_like(ends)),
    indices,
    sinks,
    True,
  )
  for t in range(LENGTH):
    for place, entry in enumerate(indices[0, t]):
      want = 0.0
      for h in range(2):
        near = [query[0, t, h] @ keys[0, s] / 8**0.5 for s in range(max(t - 4, 0), t + 1)]
        far = [query[0, t, h] @ rows[0, n] / 8**0.5 for n in indices[0, t] if n >= 0]
        total = np.exp(near).sum() + np.exp(far).sum() + np.exp(sinks[h])
        want += np.exp(query[0, t, h] @ rows[0, entry] / 8**0.5) / total if entry >= 0 else 0
      np.testing.assert_allclose(mass[0, t, place], want, rtol=1e-4, atol=1e-6)


def test_nothing_of_all_pairs_is_kept():
  """What the gradient keeps grows as the row does, not as its square."""
  config = HCA(**SIZES, ratio=8)
  module = config.build()

  def kept(length):
    def function(x):
      context = packed_context([(length,)], length)
      return module.apply(variables('hca'), x, context)[0]

    x = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32)
    _, pull = jax.eval_shape(lambda x: jax.vjp(function, x), x)
    return sum(leaf.size for leaf in jax.tree.leaves(pull))

  # Entries grow too, but a block's scores against them are forgotten.
  assert kept(2048) < 2.1 * kept(1024)


@pytest.mark.parametrize('kind', KINDS.values())
def test_mixing_flops(kind):
  """Counted pair by pair."""
  length, pairs, scores = 29, 0, 0
  for t in range(length):
    pairs += min(t + 1, kind.window)
    if not isinstance(kind, SharedWindow):
      seen = (t + 1) // kind.ratio
      pairs += min(seen, getattr(kind, 'top_k', seen))
      scores += seen
  want = 4 * kind.heads * kind.head_dim * pairs
  if isinstance(kind, CSA):
    want += kind.index_heads * (2 * kind.index_dim + 2) * scores
  assert kind.mixing_flops(length) == pytest.approx(want / length)


def test_cache_sizes():
  """What is kept of 64 tokens: a window, an entry a block, and the tokens of open blocks."""
  cache = jax.eval_shape(lambda: KINDS['csa'].empty_cache(3, 64, jnp.bfloat16))
  assert cache.recent.shape == (3, 5, 8)
  assert cache.past.entries.shape == (3, 16, 8)
  assert cache.past.values.shape == (3, 7, 16)
  assert cache.index.entries.shape == (3, 16, 6)
  cache = jax.eval_shape(lambda: KINDS['hca'].empty_cache(3, 7, jnp.bfloat16))
  assert cache.past.entries.shape == (3, 1, 8)
  assert cache.past.values.shape == (3, 7, 8)


@pytest.mark.parametrize(
  ('kind', 'field', 'value'),
  [
    ('window', 'window', 0),
    ('window', 'groups', 3),
    ('window', 'rope_dim', 10),
    ('hca', 'ratio', 0),
    ('csa', 'top_k', 0),
    ('csa', 'index_dim', 2),
  ],
)
def test_wrong_fields(kind, field, value):
  with pytest.raises(ConfigError, match=field):
    dataclasses.replace(KINDS[kind], **{field: value})
