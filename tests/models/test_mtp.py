"""Multi-token prediction: what each depth sees, and what it is scored on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.context import shift_left, text_context
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.hyper_connections import HyperConnections
from deepseek_jax.layers.residual import Add
from deepseek_jax.models.decoder import grouped, plan_segments
from deepseek_jax.models.deepseek_v4 import DeepSeekV4
from deepseek_jax.models.mtp import MTP, LaneMTP
from deepseek_jax.models.stack import TransformerBlock
from deepseek_jax.train.objective import batch_totals, target_weights

DEPTH = 2


SHARED = {
  'heads': 2,
  'head_dim': 8,
  'rope_dim': 4,
  'query_latent': 6,
  'groups': 1,
  'group_dim': 6,
  'window': 4,
  'rope': RoPE(),
}


def lanes(residual):
  """Two layers, and two depths that look into the lanes."""
  window = SharedWindow(**SHARED)
  return DeepSeekV4(
    depth=2,
    width=12,
    vocab=13,
    first=HCA(**SHARED, ratio=4),
    sparse=CSA(**SHARED, ratio=2, top_k=2, index_heads=2, index_dim=4),
    heavy=HCA(**SHARED, ratio=4),
    feed_forward=SwiGLU(hidden=7, limit=0.5),
    first_layers=1,
    residual=residual,
    mtp=LaneMTP(depth=DEPTH, attention=window),
  )


FAMILIES = {'states': None, 'lanes': HyperConnections(lanes=3), 'one_lane': Add()}


@pytest.fixture(scope='module', params=FAMILIES)
def look_ahead(request, tiny, canonical_variables):
  """Jitted `context -> [hidden of depth 1, hidden of depth 2]`."""
  residual = FAMILIES[request.param]
  model = tiny(depth=2, mtp=MTP(depth=DEPTH)) if residual is None else lanes(residual)
  segments = plan_segments(model)
  variables = {k: grouped(v, segments) for k, v in canonical_variables(model).items()}
  variables = jax.tree.map(jnp.asarray, variables)
  decoder = model.build()
  method = lambda module, c: module.every_depth(c)[1:]  # noqa: E731
  return jax.jit(lambda c: decoder.apply(variables, c, method=method))


def test_depth_k_sees_k_tokens_more_and_no_other(look_ahead):
  tokens = jnp.asarray(np.random.default_rng(0).integers(3, 13, (1, 9)), jnp.int32)
  before = look_ahead(text_context(tokens))
  assert len(before) == DEPTH
  for place in range(9):
    after = look_ahead(text_context(tokens.at[0, place].set(1)))
    for k in range(1, DEPTH + 1):
      differs = np.any(np.asarray(after[k - 1] != before[k - 1])[0], axis=-1)
      first = max(place - k, 0)
      # Position t sees tokens up to t + k: it must not see t + k + 1, which it predicts.
      assert not differs[:first].any(), (k, place)
      assert differs[first], (k, place)


def packed_batch():
  """Rows as the packer makes them; the token after the last of a row is known to it."""
  segments = np.array([[1, 1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 2, 2, 2]], np.int32)
  tokens = np.arange(18, dtype=np.int32).reshape(2, 9) + 3
  targets = np.zeros_like(tokens)
  targets[:, :-1] = tokens[:, 1:]
  targets[1, -1] = 77
  weights = np.zeros(tokens.shape, np.float32)
  for b, t in np.ndindex(2, 8):
    weights[b, t] = segments[b, t] > 0 and segments[b, t] == segments[b, t + 1]
  # The last document of the second row goes on in another row.
  weights[1, -1] = 1
  return Batch(
    tokens=tokens,
    targets=targets,
    weights=weights,
    positions=np.zeros_like(tokens),
    segments=segments,
    documents=np.zeros_like(tokens),
  )


def test_targets_and_weights_of_every_depth():
  batch = packed_batch()
  got = target_weights(batch, DEPTH)
  assert got.shape == (3, 2, 9)
  np.testing.assert_array_equal(got[0], batch.weights)
  for k in range(1, DEPTH + 1):
    targets = np.asarray(shift_left(jnp.asarray(batch.targets), k))
    for b, t in np.ndindex(2, 9):
      segment = batch.segments[b, t]
      # Depth k at t has read token t + k and predicts the one after it, all in one document.
      inside = t + k < 9 and segment > 0 and batch.segments[b, t + k] == segment
      want = inside and batch.weights[b, t + k] > 0
      assert got[k, b, t] == want, (k, b, t)
      if want:
        after = t + k + 1
        assert targets[b, t] == (batch.tokens[b, after] if after < 9 else 77)


def test_totals_count_the_weights():
  batch = packed_batch()
  totals = batch_totals(batch, DEPTH)
  # Documents of 4, 2, 1 tokens; one of 6, and 3 with a known fourth.
  np.testing.assert_array_equal(totals.targets, [3 + 1 + 5 + 3, 2 + 0 + 4 + 2, 1 + 3 + 1])
  assert totals.rows == 2


def test_a_batch_of_padding_divides_by_one():
  batch = jax.tree.map(np.zeros_like, packed_batch())
  np.testing.assert_array_equal(batch_totals(batch, 1).targets, [1, 1])


def test_lanes_by_hand(canonical_variables):
  """Every lane has a part of its own and one of the embedding, each through a norm and a matrix."""
  model = lanes(HyperConnections(lanes=3))
  block = model.mtp.block(model.layers()[-1])
  assert block == dataclasses.replace(model.layers()[-1], attention=SharedWindow(**SHARED))
  params = canonical_variables(model)['params']['mtp_0']
  rng = np.random.default_rng(3)
  stream, embedded = (rng.standard_normal(s).astype('f') for s in ((1, 7, 3, 12), (1, 7, 12)))
  context = text_context(jnp.zeros((1, 7), jnp.int32))
  module = model.mtp.build(model.layers()[-1])
  state, hidden, _ = module.apply({'params': params}, stream, embedded, context)

  def part(x, name):
    x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return x * params[f'{name}_norm']['scale'] @ params[f'{name}_join']

  opened = part(embedded, 'embedding')[:, :, None] + part(stream, 'hidden')
  want, _ = TransformerBlock(block).apply({'params': params['block']}, opened, context)
  np.testing.assert_allclose(state, want, atol=1e-5)
  close = block.residual.build().apply({'params': params['close']}, want, method='close')
  close /= np.sqrt(np.mean(close**2, axis=-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(hidden, close * params['norm']['scale'], atol=1e-5)


def test_wrong_depth():
  with pytest.raises(ConfigError, match='depth'):
    MTP(depth=0)
  with pytest.raises(ConfigError, match='depth'):
    LaneMTP(depth=0, attention=SharedWindow(**SHARED))
