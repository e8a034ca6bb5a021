"""The order of a V4's layers."""

import dataclasses

import pytest

from configs import tiny_v4
from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.hyper_connections import HyperConnections
from deepseek_jax.models.decoder import plan_segments


def test_kinds_take_turns():
  model = tiny_v4.get_config().model
  kinds = [type(block.attention).__name__ for block in model.layers()]
  assert kinds == ['SharedWindow', 'SharedWindow', 'CSA', 'HCA', 'CSA', 'HCA']
  assert [(len(part.pattern), part.repeats) for part in plan_segments(model)] == [(1, 2), (2, 2)]
  assert {type(block.residual) for block in model.layers()} == {HyperConnections}


@pytest.mark.parametrize(('field', 'value'), [('depth', 0), ('first_layers', 7)])
def test_wrong_fields(field, value):
  model = tiny_v4.get_config().model
  with pytest.raises(ConfigError, match=field):
    dataclasses.replace(model, **{field: value})
