"""Attention maps against slow arithmetic, and against what the layer does with them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import lab
from deepseek_jax.core.config import ConfigError
from deepseek_jax.lab.walk import passage, walk
from deepseek_jax.layers.attention.gated import LATER_WINS, Gated, Share
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.mha import MHA
from deepseek_jax.layers.attention.recurrent import Recurrent, Slots
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.weights import weight
from deepseek_jax.models.decoder import canonical, plan_segments

SIZES = {'heads': 2, 'nope_dim': 6, 'rope_dim': 4, 'value_dim': 5, 'latent': 8}
KINDS = {
  'mla': MLA(**SIZES, query_latent=7),
  'window': Window(**SIZES, size=4, sinks=1),
  'gated': Gated(**SIZES, keep=Share(share=0.4), block=4, window=1),
}
TEXT = 'The number 7.'


def norm_rows(x, scale):
  """Root-mean-square norm of each row."""
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def turn(x, position, frequencies):
  """Rotates pairs of neighbouring channels of x [R]."""
  numbers = (x[0::2] + 1j * x[1::2]) * np.exp(1j * position * frequencies)
  return np.stack([numbers.real, numbers.imag], axis=-1).reshape(x.shape)


def slow_weights(p, config, x, allowed, bias):
  """Softmax weights [H, T, T] of latent attention on one row x [T, D], one pair at a time."""
  length = len(x)
  frequencies = config.rope.frequencies(config.rope_dim).astype(np.float64)
  if config.query_latent is None:
    query = np.einsum('td,dhk->thk', x, p['query'])
  else:
    latent = norm_rows(x @ p['query_down'], p['query_norm']['scale'])
    query = np.einsum('tc,chk->thk', latent, p['query_up'])
  both = x @ p['latent_down']
  latent = norm_rows(both[:, : config.latent], p['latent_norm']['scale'])
  key = np.einsum('tc,chk->thk', latent, p['key_value_up'])[..., : config.nope_dim]
  result = np.zeros((config.heads, length, length))
  for h, t in np.ndindex(config.heads, length):
    scores = np.full(length, -np.inf)
    for s in range(length):
      if allowed[t, s]:
        q, k = query[t, h], turn(both[s, config.latent :], s, frequencies)
        rotated = turn(q[config.nope_dim :], t, frequencies)
        score = q[: config.nope_dim] @ key[s, h] + rotated @ k
        scores[s] = score / np.sqrt(config.nope_dim + config.rope_dim) + bias[s]
    result[h, t] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
  return result


def seen_by(config, gate):
  """Who sees whom [T, T], by the definition of each kind."""
  length = len(gate)
  allowed = np.tril(np.ones((length, length), bool))
  # Of equal letters, which the first layer scores alike, the later wins.
  ranked = gate + np.arange(length) * LATER_WINS
  for t, s in np.ndindex(allowed.shape):
    if isinstance(config, Window):
      allowed[t, s] &= t - s < config.size or s < config.sinks
    if isinstance(config, Gated):
      past = max(t // config.block * config.block - config.window, 0)
      count = int(np.ceil(past * config.keep.share - 1e-9))
      allowed[t, s] &= s >= past or s in np.argsort(-ranked[:past])[:count]
  return allowed


@pytest.fixture(scope='module', params=KINDS)
def kind(request, make_model):
  """A model of two layers of one kind, and its maps."""
  model = make_model(depth=2, dense_layers=2, attention=KINDS[request.param])
  return model, lab.attention_maps(model, TEXT)


def test_rows_sum_to_one_and_look_back(kind):
  """Of every layer and head."""
  _, maps = kind
  length = len(TEXT) + 1
  assert len(maps.pieces) == length
  assert len(maps.weights) == 2
  for weights in maps.weights:
    assert weights.shape == (2, length, length)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=1e-5)
    assert (weights >= 0).all()
    assert not np.triu(weights, 1).any()
    assert weights[:, -1].max() < 0.99


def test_weights_are_those_of_slow_arithmetic(kind):
  """Window and gate hide what they should; queries, keys, rotation and scale are right."""
  model, maps = kind
  config = model.experiment.model.attention
  layers = canonical(model.variables['params'], plan_segments(model.experiment.model))['layers']
  streams = [np.asarray(v.stream[0], np.float64) for v in walk(model, passage(model, TEXT).context)]
  for index, stream in enumerate(streams[:-1]):
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), layers[str(index)])
    x = norm_rows(stream, p['attention_norm']['scale'])
    gate = (x @ p['attention']['gate'])[:, 0] if isinstance(config, Gated) else np.zeros(len(x))
    bias = -np.log1p(np.exp(-gate)) if isinstance(config, Gated) else gate
    expected = slow_weights(p['attention'], config, x, seen_by(config, gate), bias)
    np.testing.assert_allclose(maps.weights[index], expected, atol=2e-5)


def test_multi_head_attention_shows_its_weights(make_model):
  """Grouped, without rotation, one pair at a time."""
  config = MHA(heads=4, kv_heads=2, head_dim=6, rope=None)
  model = make_model(depth=1, dense_layers=1, attention=config)
  (weights,) = lab.attention_maps(model, TEXT).weights
  layers = canonical(model.variables['params'], plan_segments(model.experiment.model))['layers']
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), layers['0'])
  stream = next(walk(model, passage(model, TEXT).context)).stream[0]
  x = norm_rows(np.asarray(stream, np.float64), p['attention_norm']['scale'])
  query, key = (np.einsum('td,dhk->thk', x, p['attention'][n]) for n in ('query', 'key'))
  for h, t in np.ndindex(4, len(x)):
    scores = np.exp([query[t, h] @ key[s, h // 2] / np.sqrt(6) for s in range(t + 1)])
    np.testing.assert_allclose(weights[h, t, : t + 1], scores / scores.sum(), atol=2e-5)
    assert not weights[h, t, t + 1 :].any()


class OwnAttention(nn.Module):
  """Attention of another make: one head, weights of its own."""

  def weigh(self, x, context):
    """[B, 1, T, T]: the same to every token so far."""
    seen = jnp.tril(jnp.ones((x.shape[1], x.shape[1])))
    return jnp.broadcast_to(seen / seen.sum(axis=-1, keepdims=True), (len(x), 1, *seen.shape))

  @nn.compact
  def __call__(self, x, context, cache=None):
    """Mixes x [B, T, D]."""
    w = weight(self, 'value', (x.shape[-1],) * 2, ('embed', None), dtype=x.dtype)
    return jnp.einsum('bhts,bsd,de->bte', self.weigh(x, context), x, w), cache


class SilentAttention(OwnAttention):
  """The same, without a method that says so."""

  @nn.compact
  def __call__(self, x, context, cache=None):
    """Mixes nothing."""
    return x, cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own:
  """Config of the above."""

  module: type = OwnAttention
  heads: int = 1

  def build(self, name=None):
    """Returns the module."""
    return self.module(name=name)


def test_a_kind_of_another_make_shows_its_own(make_model):
  """By a method called `weigh`; without, the error says what to do."""
  dense = {'depth': 1, 'dense_layers': 1, 'dense': SwiGLU(hidden=4)}
  maps = lab.attention_maps(make_model(**dense, attention=Own()), 'abc')
  np.testing.assert_allclose(maps.weights[0][0, 2], [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-6)
  with pytest.raises(ConfigError, match=r'layer 0: Own gives 0 maps .* `weigh`'):
    lab.attention_maps(make_model(**dense, attention=Own(module=SilentAttention)), 'abc')


def test_slots_of_a_memory_are_no_tokens(make_model):
  dense = {'dense_layers': 2, 'dense': SwiGLU(hidden=16)}
  model = make_model(**dense, attention=Recurrent(**SIZES, size=4, memory=Slots(text=3)))
  with pytest.raises(ConfigError, match=r'layer 0: Recurrent attends to \d+ keys'):
    lab.attention_maps(model, TEXT)


def test_a_map_is_drawn(tmp_path):
  """One square a head, labelled with the tokens; some of them where there are many."""
  weights = np.random.default_rng(0).dirichlet(np.ones(70), (5, 70))
  maps = lab.AttentionMaps(pieces=('a b', '\n', '$x$', *'c' * 67), weights=(weights,))
  picture = maps.plot(layer=0)
  assert [axes.get_title() for axes in picture.axes] == [f'layer 0, head {h}' for h in range(5)]
  ticks = picture.axes[0].get_xticklabels()
  assert len(ticks) == 35
  assert ticks[0].get_text() == 'a·b'
  assert len(maps.plot(heads=[3]).axes) == 1
  picture.savefig(tmp_path / 'map.png')
  assert (tmp_path / 'map.png').stat().st_size > 1000
