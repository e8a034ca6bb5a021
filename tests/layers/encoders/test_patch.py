"""The stem is a convolution, the projection two products; both against NumPy."""

import math

import flax.linen as nn
import jax
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.encoders.interface import Tokens
from deepseek_jax.layers.encoders.patch import Patch2D
from deepseek_jax.layers.encoders.projection import SeparateProjection
from deepseek_jax.layers.feed_forward import SwiGLU

CONFIG = Patch2D(
  size=12,
  patch=3,
  merge=2,
  width=10,
  depth=1,
  attention=Bidirectional(heads=2, head_dim=4),
  feed_forward=SwiGLU(hidden=8),
)


def test_sizes():
  assert CONFIG.patches == 16
  assert CONFIG.slots == 4


def test_the_stem_is_a_convolution():
  images = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3), np.uint8)
  module = CONFIG.stem(np.float32)
  counts = np.array([12, 0], np.int32)
  params = nn.meta.unbox(module.init(jax.random.key(0), images, counts))['params']
  tokens = module.apply({'params': params}, images, counts)
  found = tokens.values
  assert tokens.real.all(axis=1).tolist() == [True, False]
  assert tokens.coordinates[1].tolist() == [[y, x] for y in range(4) for x in range(4)]
  kernel = np.asarray(params['kernel'], np.float64).reshape(3, 3, 3, 10)
  pixels = images / 127.5 - 1
  assert pixels.min() == -1
  assert pixels.max() == 1
  for r, y, x in np.ndindex(2, 4, 4):
    window = pixels[r, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3]
    want = np.einsum('ijc,ijcd->d', window, kernel) + np.asarray(params['position'])[4 * y + x]
    np.testing.assert_allclose(found[r, 4 * y + x], want, rtol=1e-4, atol=1e-5)
  convolved = jax.lax.conv_general_dilated(
    pixels.astype(np.float32),
    kernel.astype(np.float32),
    (3, 3),
    'VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  want = np.asarray(convolved).reshape(2, 16, 10) + np.asarray(params['position'])
  np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_the_projection():
  x = np.random.default_rng(1).normal(size=(2, 16, 10)).astype(np.float32)
  module = SeparateProjection().own(7)
  joined = CONFIG.join(Tokens(x, np.ones((2, 16), bool))).values
  params = nn.meta.unbox(module.init(jax.random.key(0), joined))['params']
  found = np.asarray(module.apply({'params': params}, joined))
  assert found.shape == (2, 4, 7)
  erf = np.vectorize(math.erf)
  for r, y, z in np.ndindex(2, 2, 2):
    corner = 8 * y + 2 * z
    joined = np.concatenate([x[r, corner + step] for step in (0, 1, 4, 5)]).astype(np.float64)
    h = joined @ np.asarray(params['up'])
    h = 0.5 * h * (1 + erf(h / np.sqrt(2)))
    want = h @ np.asarray(params['down'])
    np.testing.assert_allclose(found[r, 2 * y + z], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('changes', [{'size': 13}, {'depth': 0}, {'merge': 3}])
def test_wrong_sizes(changes):
  with pytest.raises(ConfigError, match=next(iter(changes))):
    Patch2D(**{**vars(CONFIG), **changes})
