"""A model as a row of units: its loss and gradients are those that training has."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import image_caption, tiny_mla, tiny_v4
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.tree import flatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.models.cost import training_flops, weights_of
from deepseek_jax.models.decoder import canonical, init_variables, plan_segments
from deepseek_jax.models.remat import EveryLayer
from deepseek_jax.pods.schedule.measure import count_costs, init_canonical, measure_costs
from deepseek_jax.pods.schedule.split import split
from deepseek_jax.pods.schedule.units import Data, join, model_units
from deepseek_jax.sharding.rules import logical_axes
from deepseek_jax.train.objective import batch_context, batch_totals, training_loss


def packed(rows, length):
  """A batch with two documents and padding in every row."""
  tokens = np.random.default_rng(0).integers(0, 200, (rows, length), np.int32)
  place = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
  first, end = length // 3, length - 2
  segments = np.where(place < first, 1, np.where(place < end, 2, 0)).astype(np.int32)
  positions = np.where(place < first, place, place - first).astype(np.int32)
  weights = (segments > 0).astype(np.float32)
  arrays = (tokens, np.roll(tokens, -1, 1), weights, positions, segments, segments - 1)
  return Batch(*map(jnp.asarray, arrays))


def shallow(depth=2, dense_layers=1):
  """Dense layers, then some with experts, MTP after them."""
  base = tiny_mla.get_config()
  model = dataclasses.replace(base.model, depth=depth, dense_layers=dense_layers)
  return dataclasses.replace(base, model=model)


def gradients_of_stages(config, batch, sizes):
  """Loss and gradients by address, from stages of as many units, backward in two parts."""
  params, buffers = init_canonical(config)
  totals = batch_totals(batch, config.model.mtp.depth)
  data = Data(batch, buffers, totals.targets, jnp.float32(totals.rows))
  units, carry, ran = model_units(config), {}, []
  for size in sizes:
    stage, units = join(units[:size]), units[size:]
    weights = stage.weights(params)
    parts = split(stage.run, weights, carry, data, 'cpu')
    carry, kept = jax.jit(parts.forward)(weights, carry, data)
    ran.append((weights, parts, kept))
  assert not units
  sums, cotangent = {}, jnp.float32(1)
  for weights, parts, kept in reversed(ran):
    cotangent, left = jax.jit(parts.backward_input)(weights, data, kept, cotangent)
    found = jax.jit(parts.backward_weight)(weights, data, left)
    for address, tree in found.items():
      for name, value in flatten(tree).items():
        name = f'{address}/{name}'
        sums[name] = sums.get(name, 0) + value
  return carry, sums


def gradients_of_training(config, batch):
  """Loss and gradients by address, as a training step makes them."""
  decoder = config.model.build(dtype=jnp.float32)
  variables = nn.meta.unbox(init_variables(decoder, jax.random.key(config.seed)))
  weight = config.objective.build(config.train_steps)(jnp.int32(0))

  def loss(params):
    given = {'params': params, 'buffers': variables['buffers']}
    totals = batch_totals(batch, config.model.mtp.depth)
    context = batch_context(batch, config.rules)
    chunk = config.objective.chunk
    return training_loss(decoder, given, batch, totals, weight, context, chunk)[0]

  value, grads = jax.jit(jax.value_and_grad(loss))(variables['params'])
  return value, flatten(canonical(grads, plan_segments(config.model)))


def compare(config, sizes, tolerance):
  """Stages against training."""
  batch = packed(2, 19)
  loss, found = gradients_of_stages(config, batch, sizes)
  expected_loss, expected = gradients_of_training(config, batch)
  assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
  assert set(found) == set(expected)
  for name, value in expected.items():
    largest = float(jnp.max(jnp.abs(value)))
    np.testing.assert_allclose(found[name], value, atol=tolerance * largest + 1e-9, err_msg=name)


@pytest.mark.slow
def test_stages_have_the_gradients_of_training():
  compare(shallow(1, dense_layers=0), (2, 1), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(1, 1, 1, 1, 1), (3, 2)])
def test_cuts_anywhere(sizes):
  compare(dataclasses.replace(shallow(3), remat=EveryLayer()), sizes, 1e-5)


@pytest.mark.slow
def test_lanes_and_hash_routers():
  config = tiny_v4.get_config()
  layers = len(config.model.layers())
  compare(config, (layers // 2, layers - layers // 2 + 2), 1e-3)


def test_counted_flops_are_those_of_training():
  config = shallow(3)
  costs = count_costs(config, 2)
  decoder = config.model.build(dtype=jnp.float32)
  boxed = jax.eval_shape(lambda: init_variables(decoder, jax.random.key(0)))
  axes = logical_axes(boxed)['params']
  weights = weights_of(config.model, nn.meta.unbox(boxed)['params'], axes)
  tokens = 2 * config.data.length
  total = sum(cost.total for cost in costs)
  assert total == pytest.approx(tokens * training_flops(config.model, weights, config.data.length))
  assert [cost.forward_exchange for cost in costs] == [0.0] * 5
  assert costs[2] == costs[3]
  assert costs[0].total == 0.0
  parameters = sum(weight.size for weight in weights)
  # The embedding is at both ends, since MTP embeds tokens too.
  again = config.model.vocab * config.model.width
  assert sum(cost.parameter_bytes for cost in costs) == 4 * (parameters + again)
  assert all(cost.kept_bytes > 0 for cost in costs[1:])


def test_recomputed_and_exchanged_layers_cost_more():
  config = shallow(2)
  plain = count_costs(config, 1, exchange=0.5)
  again = count_costs(dataclasses.replace(config, remat=EveryLayer()), 1)
  dense, mixture = plain[1], plain[2]
  assert (dense.forward_exchange, mixture.forward_exchange) == (0.0, 0.5 * mixture.forward)
  for before, after in zip(plain[1:3], again[1:3], strict=True):
    assert after.backward_input == before.backward_input + before.forward
    assert after.kept_bytes < before.kept_bytes / 4
  assert plain[-1].total == again[-1].total


def test_pieces_are_timed():
  base = tiny_mla.get_config()
  model = dataclasses.replace(base.model, depth=2, dense_layers=2, mtp=None, dense=SwiGLU(hidden=8))
  config = dataclasses.replace(base, model=model)
  costs = measure_costs(config, 1, repeats=1)
  assert len(costs) == 4
  assert costs[1] == costs[2]
  assert min(min(c.forward, c.backward_input, c.backward_weight, c.backward) for c in costs) > 0
  params, buffers = jax.eval_shape(lambda: init_canonical(config))
  assert len(buffers['layers']) == 0
  assert costs[1].parameter_bytes == sum(
    4 * leaf.size for leaf in jax.tree.leaves(params['layers']['1'])
  )


def test_pictures_are_refused():
  with pytest.raises(ConfigError, match='model is Multimodal'):
    model_units(image_caption.get_config())


def test_units_are_named_and_equal_ones_known():
  config = shallow(3)
  units = model_units(config)
  assert [unit.name for unit in units] == [
    'embedding',
    'layers/0',
    'layers/1',
    'layers/2',
    'head and MTP',
  ]
  assert len({unit.key for unit in units}) == 4
