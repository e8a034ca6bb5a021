"""Routers on a few tokens, and the choice of experts by explicit loops in float64."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from deepseek_jax.layers.context import Context


@functools.cache
def build(config, experts, top_k, width, tokens):
  """The jitted `init` and `apply` of a router; compiled once for each kind and size."""
  module = config.build(experts, top_k)
  return jax.jit(module.init), jax.jit(module.apply)


@pytest.fixture
def packed():
  """Makes the context of tokens [B, T]: a document, another one, and padding in each row."""

  def make(batch, length, vocab=11, documents=None):
    rng = np.random.default_rng(batch * 100 + length)
    segments = np.ones((batch, length), np.int32)
    if length > 4:
      segments[:, length // 2 :] = 2
      segments[0, -2:] = 0
    starts = np.diff(segments, axis=1, prepend=0) != 0
    begin = np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
    return Context(
      tokens=rng.integers(0, vocab, (batch, length)).astype(np.int32),
      positions=(np.arange(length) - begin).astype(np.int32),
      segments=segments,
    )

  return make


@pytest.fixture
def setup(packed):
  """Makes (variables, x, context, apply) of a router; the bias, where there is one, matters."""

  def make(config, experts, top_k, shape=(2, 7, 4)):
    context = packed(*shape[:2])
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    init, apply = build(config, experts, top_k, shape[-1], shape[:2])
    variables = nn.meta.unbox(init(jax.random.key(0), x, context))
    buffers = variables.get('buffers', {})
    if 'selection_bias' in buffers:
      buffers['selection_bias'] = (0.2 * np.cos(np.arange(experts))).astype(np.float32)
    return variables, x, context, apply

  return make


@pytest.fixture
def golden():
  """Routes one token whose logits are given, under a given bias."""

  def run(config, logits, bias, top_k):
    x = np.ones((1, 1, 1), np.float32)
    ids = np.zeros((1, 1), np.int32)
    variables = {'params': {'weight': np.asarray(logits, np.float32)[None]}}
    if bias is not None:
      variables['buffers'] = {'selection_bias': np.asarray(bias, np.float32)}
    apply = build(config, len(logits), top_k, 1, (1, 1))[1]
    return apply(variables, x, Context(tokens=ids, positions=ids, segments=ids + 1))

  return run


@pytest.fixture
def choose():
  """Chooses experts [N, K] for rows of selection scores [N, E]; E stands for nobody."""

  def one(row, top_k, groups, kept_groups, value, allowed, count):
    members = np.split(np.arange(len(row)), groups)
    open_to = [[e for e in group if e in allowed] for group in members]
    ranked = sorted(
      range(groups), key=lambda g: -value([row[e] for e in open_to[g]]) if open_to[g] else np.inf
    )
    left = [e for g in ranked[:kept_groups] for e in open_to[g]]
    chosen = sorted(sorted(left), key=lambda e: -row[e])[: min(top_k, count)]
    return chosen + [len(row)] * (top_k - len(chosen))

  def all_of(selection, top_k, groups=1, kept_groups=1, value=max, allowed=None, count=99):
    allowed = set(range(selection.shape[1])) if allowed is None else allowed
    return np.array(
      [one(row, top_k, groups, kept_groups, value, allowed, count) for row in selection]
    )

  return all_of


@pytest.fixture
def weigh():
  """Picks the scores of chosen experts [N, K]; nobody's is 0."""

  def pick(scores, experts):
    padded = np.pad(scores, ((0, 0), (0, 1)))
    return np.take_along_axis(padded, experts, axis=1)

  return pick
