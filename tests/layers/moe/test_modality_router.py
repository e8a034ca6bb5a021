"""A bias for each modality: who is chosen, what is counted, and how the step moves it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.layers.context import IMAGE, SOUND, TEXT, text_context
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.modality import ModalitySigmoid
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.ops.routing import expert_load, load_by_group
from deepseek_jax.optim.balance import update_buffers

CONFIG = MoE(experts=6, top_k=2, hidden=4, router=ModalitySigmoid())
MODALITY = np.array([[TEXT, IMAGE, IMAGE, SOUND, TEXT]] * 2, np.int32)


def ran(config, bias=None, modality=MODALITY):
  """Output, assignment counts and buffers of one layer."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
  context = text_context(jnp.ones((2, 5), jnp.int32))
  segments = context.segments.at[1, 4].set(0)
  context = dataclasses.replace(
    context, segments=segments, modality=None if modality is None else jnp.asarray(modality)
  )
  module = config.build()
  variables = nn.meta.unbox(module.init(jax.random.key(0), x, context))
  buffers = variables['buffers']
  if bias is not None:
    buffers = {'router': {'modality': {'selection_bias': bias}}}
  y, reported = module.apply(
    {'params': variables['params'], 'buffers': buffers}, x, context, mutable=['observed']
  )
  return y, reported['observed']['router'], buffers


def test_without_a_bias_it_is_the_sigmoid_router():
  y, facts, buffers = ran(CONFIG)
  plain, wanted, _ = ran(dataclasses.replace(CONFIG, router=Sigmoid()))
  np.testing.assert_array_equal(y, plain)
  np.testing.assert_array_equal(facts['load'], wanted['load'])
  # Expert load by modality is reported whatever the router.
  np.testing.assert_array_equal(facts['modality']['load'], wanted['modality']['load'])
  assert buffers['router']['modality']['selection_bias'].shape == (5, 6)


def test_a_bias_moves_the_tokens_of_its_modality_alone():
  bias = jnp.zeros((5, 6)).at[IMAGE, 3].set(9.0)
  _, facts, _ = ran(CONFIG, bias)
  _, before, _ = ran(CONFIG)
  load, old = (np.asarray(x['modality']['load']) for x in (facts, before))
  assert load[IMAGE, 3] == 4
  for other in (TEXT, SOUND):
    np.testing.assert_array_equal(load[other], old[other])
  np.testing.assert_array_equal(load.sum(axis=0), facts['load'])
  assert load.sum(axis=1).tolist() == [6, 8, 0, 4, 0]


def test_the_step_evens_out_each_modality():
  _, facts, buffers = ran(CONFIG)
  after = update_buffers(buffers, {'router': facts}, 0.1)['router']['modality']['selection_bias']
  load = np.asarray(facts['modality']['load'])
  want = 0.1 * np.sign(load.mean(axis=1, keepdims=True) - load)
  np.testing.assert_allclose(after, want, atol=1e-7)
  assert not np.asarray(after)[[2, 4]].any()
  assert np.asarray(after)[IMAGE].any()


def test_text_alone_is_text():
  y, facts, buffers = ran(CONFIG, modality=None)
  want, all_text, _ = ran(CONFIG, modality=np.zeros((2, 5), np.int32))
  np.testing.assert_array_equal(y, want)
  np.testing.assert_array_equal(facts['modality']['load'], all_text['modality']['load'])
  update_buffers(buffers, {'router': facts}, 0.1)
  # Other routers report it only where there is more than text.
  _, plain, _ = ran(dataclasses.replace(CONFIG, router=Sigmoid()), modality=None)
  assert list(plain) == ['load']


def test_loads_by_group():
  rng = np.random.default_rng(0)
  experts = rng.integers(0, 5, (30, 2)).astype(np.int32)
  real, group = rng.random(30) < 0.8, rng.integers(0, 3, 30).astype(np.int32)
  found = load_by_group(*(jnp.asarray(x) for x in (experts, real, group)), 3, 4)
  want = np.zeros((3, 4))
  for n, k in np.ndindex(30, 2):
    if real[n] and experts[n, k] < 4:
      want[group[n], experts[n, k]] += 1
  np.testing.assert_array_equal(found, want)
  whole = expert_load(jnp.asarray(experts), jnp.asarray(real), 4)
  np.testing.assert_array_equal(found.sum(axis=0), whole)
