"""Stems of text and sound: convolutions by loops, spectra, and media that are shorter than most."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.bias import Bias
from deepseek_jax.layers.encoders.interface import Tokens
from deepseek_jax.layers.encoders.line import Text1D, Waveform, sound_features
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.ops.stft import frames

PARTS = {
  'width': 6,
  'depth': 1,
  'attention': Bidirectional(heads=2, head_dim=4),
  'feed_forward': SwiGLU(hidden=8),
  'bias': Bias(),
}
TEXT = Text1D(**PARTS, vocab=11, length=8, stride=2, merge=2)
SOUND = Waveform(**PARTS, samples=320, rate=4000, window=50, hop=20, bands=8, merge=2)


def gelu(x):
  return np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float32), approximate=False), np.float64)


def line_oracle(p, x, real, stride):
  """Two convolutions on one medium [n, C] that ends where it ends."""
  x = x[:real]
  for name, step in (('first', 1), ('second', stride)):
    kernel, bias = (np.asarray(p[f'{name}{end}'], np.float64) for end in ('', '_bias'))
    padded = np.pad(x, ((1, 1), (0, 0)))
    places = [np.einsum('kc,kcd->d', padded[t : t + 3], kernel) for t in range(0, len(x), step)]
    x = gelu(np.array(places) + bias)
  return x


def ran(config, media, counts):
  """Parameters that are not trivial, and the tokens."""
  module = config.stem(np.float32)
  params = nn.meta.unbox(module.init(jax.random.key(0), media, counts))['params']
  params = jax.tree.map(lambda a: a + 0.1 * jnp.arange(a.size).reshape(a.shape) / a.size, params)
  return params, module.apply({'params': params}, media, counts)


def test_text():
  passages = np.random.default_rng(0).integers(0, 11, (3, 8)).astype(np.int32)
  counts = np.array([8, 5, 1], np.int32)
  params, tokens = ran(TEXT, passages, counts)
  assert tokens.real.tolist() == [[True] * 4, [True] * 3 + [False], [True] + [False] * 3]
  assert tokens.coordinates[0, :, 0].tolist() == [0, 1, 2, 3]
  entries = np.asarray(params['embedding'], np.float64) / 0.02
  for row, count in enumerate(counts):
    want = line_oracle(params['line'], entries[passages[row]], count, 2)
    want += np.asarray(params['line']['position'])[: len(want)]
    np.testing.assert_allclose(tokens.values[row, : len(want)], want, rtol=1e-4, atol=1e-4)
  assert (TEXT.patches, TEXT.slots, TEXT.medium) == (4, 2, ((8,), 'int32'))


def test_sound():
  sounds = np.random.default_rng(0).uniform(-1, 1, (3, 320)).astype(np.float32)
  counts = np.array([320, 190, 20], np.int32)
  params, tokens = ran(SOUND, sounds, counts)
  assert np.sum(tokens.real, axis=1).tolist() == [8, 5, 1]
  for row, count in enumerate(counts):
    heard = np.where(np.arange(320) < count, sounds[row], 0)
    framed = frames(jnp.asarray(np.pad(heard, (30, 0))), 50, 20)
    features = np.asarray(sound_features(SOUND, framed), np.float64)
    want = line_oracle(params['line'], features, -(-count // 20), 2)
    want += np.asarray(params['line']['position'])[: len(want)]
    np.testing.assert_allclose(tokens.values[row, : len(want)], want, rtol=1e-4, atol=1e-4)
  assert (SOUND.patches, SOUND.slots) == (8, 4)


@pytest.mark.parametrize('config', [TEXT, SOUND])
def test_what_comes_after_the_end_does_not_matter(config):
  """Not even what is not a number."""
  rng = np.random.default_rng(0)
  (length,), dtype = config.medium
  count = length * 5 // 8
  medium = rng.integers(0, 11, (1, length)) if dtype == 'int32' else rng.normal(size=(1, length))
  medium = medium.astype(dtype)
  other = medium.copy()
  other[:, count:] = 10 if dtype == 'int32' else np.nan
  counts = np.array([count], np.int32)
  params, tokens = ran(config, medium, counts)
  again = config.stem(np.float32).apply({'params': params}, other, counts)
  np.testing.assert_array_equal(again.real, tokens.real)
  np.testing.assert_array_equal(again.values[tokens.real], tokens.values[tokens.real])


def test_joining():
  """Neighbours side by side; what is not real is zero, and real where any of them is."""
  x = np.arange(24, dtype=np.float32).reshape(1, 4, 6)
  joined = TEXT.join(Tokens(jnp.asarray(x), jnp.array([[True, True, True, False]])))
  assert joined.real.tolist() == [[True, True]]
  assert joined.values[0, 0].tolist() == list(range(12))
  assert joined.values[0, 1].tolist() == [*range(12, 18), *[0] * 6]
  assert not TEXT.join(Tokens(jnp.asarray(x), jnp.zeros((1, 4), bool))).real.any()


@pytest.mark.parametrize(
  ('config', 'changes', 'fault'),
  [
    (TEXT, {'length': 7}, 'length'),
    (TEXT, {'vocab': 0}, 'vocab'),
    (SOUND, {'samples': 330}, 'samples'),
    (SOUND, {'window': 10}, 'window'),
    (SOUND, {'bands': 26}, 'bands'),
  ],
)
def test_wrong_sizes(config, changes, fault):
  with pytest.raises(ConfigError, match=fault):
    dataclasses.replace(config, **changes)
