"""The dials of the V3 family, and the layers they make."""

import dataclasses

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.plan import Segment, segment


@pytest.mark.parametrize(('dense_layers', 'depth'), [(0, 3), (1, 3), (3, 3)])
def test_layers(tiny, dense_layers, depth):
  model = tiny(depth=depth, dense_layers=dense_layers)
  layers = model.layers()
  kinds = [type(layer.feed_forward) for layer in layers]
  assert kinds == [SwiGLU] * dense_layers + [MoE] * (depth - dense_layers)
  for layer in layers:
    assert layer.attention == model.attention
    assert layer.norm == model.norm


def test_one_layer_can_be_another(tiny):
  layers = tiny(depth=6).layers()
  layers[3] = dataclasses.replace(layers[3], feed_forward=SwiGLU(hidden=6))
  dense, sparse = layers[0], layers[1]
  # The same kind as layer 0, so a pattern of three runs twice.
  assert segment(layers) == (Segment((dense, sparse, sparse), 2),)


def test_asking_for_layers_twice_gives_two_lists(tiny):
  model = tiny()
  model.layers().clear()
  assert len(model.layers()) == 3


def test_wrong_fields(tiny):
  with pytest.raises(ConfigError) as caught:
    dataclasses.replace(tiny(), depth=0, width=-1)
  assert [m.split('`')[1] for m in caught.value.messages] == ['depth', 'width', 'dense_layers']
