"""Loads and biases come out by layer, whatever way the layers were grouped."""

import dataclasses

import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax.models.decoder import plan_segments
from deepseek_jax.models.plan import unroll
from deepseek_jax.train.report import (
  drop_rates,
  expert_figures,
  layer_biases,
  layer_loads,
  modality_figures,
)

LOADS = {'1': [4.0, 0.0, 0.0, 0.0], '2': [1.0, 1.0, 1.0, 1.0], '3': [0.0, 3.0, 1.0, 0.0]}
MTP_LOAD = [2.0, 2.0, 0.0, 0.0]


def tree(name, groups):
  """A collection as the step returns it; `groups` are (segment, block, value) of the stack."""
  result = {'mtp_0': {'block': {'feed_forward': {'router': {name: np.array(MTP_LOAD)}}}}}
  stack = result.setdefault('stack', {})
  for number, block, value in groups:
    leaf = {'feed_forward': {'router': {name: np.array(value), 'other': np.zeros_like(value)}}}
    stack.setdefault(f'segment_{number}', {})[f'block_{block}'] = leaf
  return result


@pytest.fixture
def segments():
  """One dense layer, then three with experts in one scan."""
  model = dataclasses.replace(tiny_mla.get_config().model, depth=4)
  found = plan_segments(model)
  assert [part.repeats for part in found] == [1, 3]
  return found


def check(found):
  """Every layer with experts has its own load, in the order of the layers."""
  assert list(found) == ['mtp_0', 'layers/1', 'layers/2', 'layers/3']
  np.testing.assert_array_equal(found['mtp_0'], MTP_LOAD)
  for layer, load in LOADS.items():
    np.testing.assert_array_equal(found[f'layers/{layer}'], load)


def test_scanned_layers(segments):
  """A scan's arrays are taken apart."""
  check(layer_loads(tree('load', [(1, 0, list(LOADS.values()))]), segments))
  check(layer_biases(tree('selection_bias', [(1, 0, list(LOADS.values()))]), segments))


def test_another_grouping(segments):
  """Two layers a scan step and one over: the same addresses."""
  regrouped = unroll(segments, 2)
  assert [part.layers for part in regrouped] == [1, 2, 1]
  groups = [(1, 0, LOADS['1']), (1, 1, LOADS['2']), (2, 0, LOADS['3'])]
  check(layer_loads(tree('load', groups), regrouped))


def test_drop_rates(segments):
  """A rate a layer that may drop; a layer without a single choice has dropped none."""
  feed_forward = {'choices': np.array([8.0, 4.0, 0.0]), 'dropped': np.array([2.0, 0.0, 0.0])}
  observed = tree('load', [(1, 0, list(LOADS.values()))])
  observed['stack']['segment_1']['block_0']['feed_forward'] |= feed_forward
  found = drop_rates(observed, segments)
  assert found == {'layers/1': 0.25, 'layers/2': 0.0, 'layers/3': 0.0}


def test_figures():
  """By hand: all on one expert of four, and perfectly even."""
  loads = {'layers/1': np.array([4.0, 0, 0, 0]), 'layers/2': np.array([2.0, 2, 2, 2])}
  biases = {'layers/1': np.array([3.0, 4, 0, 0]), 'layers/2': np.zeros(4)}
  assert expert_figures(loads, biases, {'layers/2': 1 / 3}) == {
    'load': {'layers/1': [1.0, 0.0, 0.0, 0.0], 'layers/2': [0.25, 0.25, 0.25, 0.25]},
    'max_violation': [3.0, 0.0],
    'dead_fraction': [0.75, 0.0],
    'load_entropy': [0.0, 1.0],
    'bias_norm': [5.0, 0.0],
    'drop_rate': [0.333333],
  }


def test_dense_models_have_no_figures():
  """No experts, nothing to say; and no bias, no norm."""
  assert expert_figures({}, {}, {}) == {}
  figures = expert_figures({'layers/0': np.ones(2)}, {}, {})
  assert not {'bias_norm', 'drop_rate'} & set(figures)


def test_a_batch_of_padding():
  """No token at all: shares are zero, not nan."""
  figures = expert_figures({'layers/0': np.zeros(2)}, {}, {})
  assert figures['load'] == {'layers/0': [0.0, 0.0]}
  assert figures['max_violation'] == [0.0]


def test_loads_by_modality():
  """Shares of each modality that came, by layer; of text alone nothing is said."""
  model = dataclasses.replace(tiny_mla.get_config().model, depth=1, dense_layers=0)
  segments = plan_segments(model)

  def observed(*loads):
    load = np.zeros((5, 4), np.float32)
    load[: len(loads)] = loads
    router = {'load': load.sum(axis=0), 'modality': {'load': load}}
    return {'stack': {'segment_0': {'block_0': {'feed_forward': {'router': router}}}}}

  found = modality_figures(observed([1, 1, 2, 0], [0, 0, 0, 5]), segments)
  assert found == {
    'modality_load': {
      'layers/0/text': [0.25, 0.25, 0.5, 0.0],
      'layers/0/image': [0.0, 0.0, 0.0, 1.0],
    }
  }
  assert modality_figures(observed([1, 1, 2, 0]), segments) == {}
