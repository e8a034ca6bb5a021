"""Experts as copies of others, in a state that is small enough to look at whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.optim.optimizer import AdamW, Muon
from deepseek_jax.train.expert_copy import Copies, copy_experts
from deepseek_jax.train.state import fresh_state

E = 4
SCANNED, SINGLE = 'stack/segment_0/block_0/feed_forward', 'mtp_0/block/feed_forward'
AXES = {
  f'{SCANNED}/up_in': ('layers', 'expert', 'expert_embed', None),
  f'{SCANNED}/up_shared': ('layers', 'expert_embed', 'expert_mlp'),
  f'{SCANNED}/router/weight': ('layers', 'embed', 'routed'),
  f'{SINGLE}/gate': ('expert', 'expert_embed', 'expert_mlp'),
  f'{SINGLE}/router/keys': ('routed', None),
  'head/weight': ('embed', 'vocab'),
}
SIZES = {'layers': 2, 'expert': E, 'routed': E, 'vocab': 7, 'expert_mlp': 5}
OPTIMIZERS = {'adam': AdamW(peak_lr=0.1), 'muon': Muon(peak_lr=0.1, fast_steps=1)}


def make_state(optimizer, averaged):
  """A state after one update, so that no moment is zero."""
  rng = np.random.default_rng(0)
  flat = {
    name: rng.standard_normal([SIZES.get(a, 3) for a in axes]).astype(np.float32)
    for name, axes in AXES.items()
  }
  params = unflatten(flat)
  rule = optimizer.build(lambda step: 1.0, unflatten(AXES))

  @jax.jit
  def update(params):
    updates, moments = rule.update(params, rule.init(params), params)
    return optax.apply_updates(params, updates), moments

  buffers = {
    f'{SCANNED}/router/selection_bias': jnp.asarray(rng.standard_normal((2, E)), jnp.float32),
    f'{SCANNED}/breaker': jnp.ones((2, E)),
  }
  ema = jax.tree.map(lambda x: np.asarray(x) + 1, params) if averaged else ()
  params, moments = update(params)
  return fresh_state(params, unflatten(buffers), moments, ema)


COPIES = {
  # In the second layer of the scan, expert 0 becomes as 3, and 2 as 1; in the first none.
  SCANNED: (np.array([[0, 0, 0, 0], [1, 0, 1, 0]], bool), [[0, 1, 2, 3], [3, 1, 1, 3]]),
  SINGLE: (np.array([0, 0, 0, 1], bool), [0, 1, 2, 2]),
}


def copies(noise):
  return {
    name: Copies(jnp.asarray(fresh), jnp.asarray(donors, jnp.int32), jnp.full(fresh.shape, noise))
    for name, (fresh, donors) in COPIES.items()
  }


def parts(name, array):
  """(layer, expert) -> that part of an array, counting from its axes."""
  axes = AXES[name]
  array = np.asarray(array)
  lead = range(2) if axes[0] == 'layers' else [0]
  place = next(i for i, axis in enumerate(axes) if axis in ('expert', 'routed'))
  found = {}
  for row in lead:
    whole = array[row] if axes[0] == 'layers' else array
    for e in range(E):
      found[row, e] = np.take(whole, e, axis=place - (axes[0] == 'layers'))
  return found


@pytest.mark.parametrize('kind', OPTIMIZERS)
def test_copies(kind):
  """Without noise everything is a copy to the bit; what is nobody's stays as it is."""
  state = make_state(OPTIMIZERS[kind], averaged=True)
  run = jax.jit(lambda s, c: copy_experts(s, unflatten(AXES), c, jax.random.key(1)))
  made = jax.device_get(run(state, copies(0.0)))
  old, new = flatten(state.params), flatten(made.params)
  counted = [name for name in AXES if set(AXES[name]) & {'expert', 'routed'}]
  moments = {
    jax.tree_util.keystr(path, simple=True, separator='/'): (a, b)
    for (path, a), b in zip(
      jax.tree_util.tree_leaves_with_path(state.opt_state), jax.tree.leaves(made.opt_state)
    )
  }
  touched = 0
  for name in counted:
    fresh, donors = COPIES[SCANNED if name.startswith(SCANNED) else SINGLE]
    fresh, donors = np.atleast_2d(fresh), np.atleast_2d(donors)
    before, after = parts(name, old[name]), parts(name, new[name])
    ema = parts(name, flatten(state.ema)[name]), parts(name, flatten(made.ema)[name])
    for row, e in before:
      source = donors[row][e] if fresh[row][e] else e
      np.testing.assert_array_equal(after[row, e], before[row, source])
      np.testing.assert_array_equal(
        ema[1][row, e], after[row, e] if fresh[row][e] else ema[0][row, e]
      )
    own = [pair for address, pair in moments.items() if address.endswith(f'/{name}')]
    assert len(own) == (2 if kind == 'adam' else 1), name
    for pair in own:
      first, second = (parts(name, leaf) for leaf in pair)
      for row, e in first:
        assert np.any(first[row, e])
        np.testing.assert_array_equal(second[row, e], 0 if fresh[row][e] else first[row, e])
        touched += fresh[row][e]
  assert touched == (2 * 2 + 2 * 1) * (2 if kind == 'adam' else 1)
  for name in ('head/weight', f'{SCANNED}/up_shared'):
    np.testing.assert_array_equal(new[name], old[name])
  bias = np.asarray(flatten(state.buffers)[f'{SCANNED}/router/selection_bias'])
  found = flatten(made.buffers)
  np.testing.assert_array_equal(
    found[f'{SCANNED}/router/selection_bias'], [bias[0], bias[1][[3, 1, 1, 3]]]
  )
  np.testing.assert_array_equal(found[f'{SCANNED}/breaker'], 1)


def test_noise_is_a_share_of_each_array():
  """And differs from copy to copy."""
  state = make_state(OPTIMIZERS['adam'], averaged=False)
  donors = {SINGLE: (np.array([0, 1, 1, 1], bool), [0, 0, 0, 0])}
  wanted = {
    name: Copies(jnp.asarray(fresh), jnp.asarray(source, jnp.int32), jnp.full(E, 0.1))
    for name, (fresh, source) in donors.items()
  }
  wide = dict(flatten(state.params))
  wide[f'{SINGLE}/gate'] = jnp.asarray(np.random.default_rng(1).normal(0, 3, (E, 40, 50)))
  state = dataclasses.replace(state, params=unflatten(wide), opt_state=())
  made = jax.jit(lambda s: copy_experts(s, unflatten(AXES), wanted, jax.random.key(2)))(state)
  assert made.ema == ()
  gate = np.asarray(flatten(made.params)[f'{SINGLE}/gate'])
  noise = gate[1:] - gate[0]
  np.testing.assert_allclose(np.std(noise, axis=(1, 2)), 0.3, rtol=0.05)
  assert np.std(noise[0] - noise[1]) > 0.3


def test_nobody_is_copied():
  state = make_state(OPTIMIZERS['adam'], averaged=True)
  none = jax.tree.map(lambda x: jnp.zeros_like(x), copies(0.1))
  made = jax.jit(lambda s: copy_experts(s, unflatten(AXES), none, jax.random.key(1)))(state)
  jax.tree.map(np.testing.assert_array_equal, made, state)
