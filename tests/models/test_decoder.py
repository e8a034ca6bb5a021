"""The whole decoder: who sees whom, where its weights lie, what it computes in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.layers.attention.gated import Gated
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.layers.context import shift_left
from deepseek_jax.layers.weights import Labelled
from deepseek_jax.models.decoder import (
  canonical,
  grouped,
  init_variables,
  plan_segments,
)
from deepseek_jax.models.mtp import MTP
from deepseek_jax.models.plan import Segment
from deepseek_jax.models.remat import SquareRoot

SIZES = {'heads': 2, 'nope_dim': 4, 'rope_dim': 2, 'value_dim': 3, 'latent': 5}


@pytest.fixture(scope='module')
def runner(tiny, canonical_variables):
  """Makes a jitted `context -> (hidden, logits)`, its model and its grouped variables."""

  def make(dtype=jnp.float32, **changes):
    model = tiny(**changes)
    variables = canonical_variables(model)
    segments = plan_segments(model)
    variables = {name: grouped(tree, segments) for name, tree in variables.items()}
    decoder = model.build(dtype=dtype)

    def forward(module, context):
      hidden, _ = module(context)
      return hidden, module.logits(hidden, context)

    return jax.jit(lambda c: decoder.apply(variables, c, method=forward))

  return make


@pytest.mark.parametrize('attention', [None, Window(**SIZES, size=2, sinks=1), Gated(**SIZES)])
def test_tokens_change_nothing_before_them_and_in_no_other_document(attention, runner, context):
  run = runner(**({} if attention is None else {'attention': attention}))
  before = np.asarray(run(context)[0])
  places = {
    (0, 2): [(0, 2), (0, 3)],
    (0, 4): [(0, 4), (0, 5), (0, 6)],
    (1, 7): [(1, 7), (1, 8)],
  }
  for place, changed in places.items():
    tokens = context.tokens.at[place].set(1)
    after = np.asarray(run(context.replace(tokens=tokens))[0])
    real = np.asarray(context.real)
    differs = np.any(after != before, axis=-1) & real
    got = {tuple(map(int, index)) for index in np.argwhere(differs)}
    # A window may not reach all of the later ones; the token itself always changes.
    assert got <= set(changed), place
    assert place in got


def test_logits_are_float32_products_with_the_head(runner, context):
  hidden, logits = runner(dtype=jnp.bfloat16)(context)
  assert hidden.dtype == jnp.bfloat16
  assert logits.dtype == jnp.float32
  assert logits.shape == (2, 9, 13)
  exact = runner()(context)[1]
  scale = np.max(np.abs(exact))
  error = np.asarray(logits - exact)[np.asarray(context.real)]
  # A token may go to another expert; most do not.
  assert np.median(np.abs(error)) < 0.02 * scale


def test_init_declares_everything_labelled_in_float32(tiny):
  model = tiny(depth=3, mtp=MTP(depth=2))
  decoder = model.build(dtype=jnp.bfloat16)
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  assert set(boxed) == {'params', 'buffers'}
  assert set(boxed['params']) == {'embedding', 'stack', 'norm', 'head', 'mtp_0', 'mtp_1'}
  leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, Labelled))
  for box in leaves:
    assert isinstance(box, Labelled)
    assert len(box.names) == box.value.ndim
    assert box.value.dtype == jnp.float32
  scanned = boxed['params']['stack']['segment_1']['block_0']
  names = {
    box.names[0]
    for box in jax.tree.leaves(scanned, is_leaf=lambda leaf: isinstance(leaf, Labelled))
  }
  assert names == {'layers'}


def test_canonical_addresses_do_not_depend_on_the_grouping(tiny, canonical_variables):
  model = tiny(depth=4)
  params = canonical_variables(model)['params']
  assert set(params) == {'embedding', 'layers', 'norm', 'head'}
  assert list(params['layers']) == ['0', '1', '2', '3']
  plans = (plan_segments(model), plan_segments(model, SquareRoot()))
  for segments in (*plans, tuple(Segment((block,), 1) for block in model.layers())):
    tree = grouped(params, segments)
    assert set(tree) == {'embedding', 'stack', 'norm', 'head'}
    jax.tree.map(np.testing.assert_array_equal, canonical(tree, segments), params)


def test_shift_left():
  x = jnp.array([[1, 2, 3], [4, 5, 6]])
  np.testing.assert_array_equal(shift_left(x, 0), x)
  np.testing.assert_array_equal(shift_left(x, 1), [[2, 3, 0], [5, 6, 0]])
  np.testing.assert_array_equal(shift_left(x, 3), np.zeros((2, 3)))
  np.testing.assert_array_equal(shift_left(x, 7), np.zeros((2, 3)))
