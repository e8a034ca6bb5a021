"""Latent attention in float64, one query at a time, for any rule of who sees whom."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from deepseek_jax.layers.context import Context

SIZES = {'heads': 2, 'nope_dim': 6, 'rope_dim': 4, 'value_dim': 5, 'latent': 8}


def norm_rows(x, scale, epsilon=1e-6):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def turn(x, position, frequencies):
  """Rotates pairs of neighbouring channels of x [..., R]."""
  numbers = x[..., 0::2] + 1j * x[..., 1::2]
  numbers = numbers * np.exp(1j * position * frequencies)
  return np.stack([numbers.real, numbers.imag], axis=-1).reshape(x.shape)


def attention_oracle(params, config, x, positions, allowed, bias=None):
  """Returns [B, T, D]: `allowed(b, t, s)` says who sees whom, `bias` [B, S] is added to scores."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x = np.asarray(x, np.float64)
  frequencies = config.rope.frequencies(config.rope_dim).astype(np.float64)
  if config.query_latent is None:
    query = np.einsum('btd,dhk->bthk', x, p['query'])
  else:
    latent = norm_rows(x @ p['query_down'], p['query_norm']['scale'])
    query = np.einsum('btc,chk->bthk', latent, p['query_up'])
  both = x @ p['latent_down']
  latent = norm_rows(both[..., : config.latent], p['latent_norm']['scale'])
  pair = np.einsum('btc,chk->bthk', latent, p['key_value_up'])
  out = np.zeros(x.shape)
  for b, t in np.ndindex(x.shape[:2]):
    seen = [s for s in range(x.shape[1]) if allowed(b, t, s)]
    for h in range(config.heads):
      q = query[b, t, h]
      q_rope = turn(q[config.nope_dim :], positions[b, t], frequencies)
      scores = []
      for s in seen:
        k_rope = turn(both[b, s, config.latent :], positions[b, s], frequencies)
        score = q[: config.nope_dim] @ pair[b, s, h, : config.nope_dim] + q_rope @ k_rope
        scores.append(score * config.softmax_scale + (0 if bias is None else bias[b, s]))
      weights = np.exp(np.array(scores) - max(scores, default=0))
      weights /= max(weights.sum(), 1e-30)
      value = sum(w * pair[b, s, h, config.nope_dim :] for w, s in zip(weights, seen))
      out[b, t] += value @ p['output'][h]
  return out


@pytest.fixture(scope='session')
def oracle() -> Callable[..., np.ndarray]:
  """The slow twin of every latent attention kind."""
  return attention_oracle


@pytest.fixture(scope='session')
def sizes() -> dict[str, int]:
  """Sizes of a small latent attention, all different."""
  return SIZES


@pytest.fixture(scope='session')
def packed() -> tuple[jax.Array, Context]:
  """Activations [2, 9, 7] of packed rows: two documents and padding; one document."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 9, 7)).astype(np.float32)
  positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]], np.int32)
  segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 9], np.int32)
  return x, Context(tokens=np.ones((2, 9), np.int32), positions=positions, segments=segments)


@pytest.fixture(scope='session')
def build() -> Callable[..., tuple[Any, Callable[..., jax.Array]]]:
  """Makes `config -> (params, jitted (params, x, context) -> y)` for x [B, T, 7]."""

  def make(config):
    module = config.build()
    x = np.zeros((1, 2, 7), np.float32)
    ids = np.zeros((1, 2), np.int32)
    context = Context(tokens=ids, positions=ids, segments=ids + 1)
    params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), x, context))['params']
    # Scales of ones would hide a norm that forgets its scale.
    keys = iter(range(100))
    params = jax.tree.map(
      lambda p: (
        p + 0.3 * jax.random.normal(jax.random.key(next(keys)), p.shape) if p.ndim == 1 else p
      ),
      params,
    )
    return params, jax.jit(lambda p, x, c: module.apply({'params': p}, x, c)[0])

  return make
