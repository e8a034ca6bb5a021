"""Rough plans: no compiler, no devices."""

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.models.remat import SquareRoot
from deepseek_jax.pods.analytic import estimate_roughly, group_along, rough_machine
from deepseek_jax.pods.topology import parse_topology
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT, TENSOR

SLICE = parse_topology('v6e:4x2')


def rough(experiment):
  """The rough plan on eight chips."""
  return estimate_roughly(experiment, rough_machine(experiment, SLICE))


def test_more_microbatches_hold_less_and_send_more(shrink):
  """Weights are gathered anew for each."""
  one, four = (rough(shrink(mesh=MeshConfig(data=8), microbatches=n)) for n in (1, 4))
  assert four.memory['activations'] == one.memory['activations'] / 4
  assert four.exchanged['data', 'weights'] == pytest.approx(4 * one.exchanged['data', 'weights'])
  assert four.flops == one.flops


def test_what_is_recomputed_is_not_held(shrink):
  """And costs work; √L layers hold less again."""
  plain, every, root = (
    rough(shrink(mesh=MeshConfig(data=8), remat=remat))
    for remat in (None, shrink().remat, SquareRoot())
  )
  assert plain.memory['activations'] > every.memory['activations']
  assert every.memory['activations'] >= root.memory['activations']
  assert plain.flops < every.flops == pytest.approx(plain.flops * 4 / 3, rel=0.15)


def test_tensor_parallel_weights_stay_and_sums_travel(shrink):
  """Along `model`."""
  found = rough(shrink(mesh=MeshConfig(data=2, model=4), rules=TENSOR))
  assert ('model', 'stream') in found.exchanged
  assert ('data', 'weights') in found.exchanged


def test_rows_travel_to_experts(shrink):
  """There and back in each of three passes, to all but a quarter of the devices."""
  changes = {'model.dense_layers': 2, 'model.feed_forward.dispatch': AllToAll(bound=2.0)}
  experiment = shrink(mesh=MeshConfig(data=2, expert=4), rules=EXPERT, **changes)
  tokens, layers, top_k = 64 * 16 / 8, 2, 2
  rows = tokens * top_k * 256 * 4
  sent = rough(experiment).exchanged['expert', 'rows']
  assert sent == pytest.approx(layers * 2 * 3 * rows * 3 / 4)


def test_what_does_not_divide_is_refused(shrink):
  """With the address."""
  with pytest.raises(ConfigError, match='not divisible'):
    estimate_roughly(
      shrink(mesh=MeshConfig(data=1, model=3), rules=TENSOR),
      rough_machine(shrink(mesh=MeshConfig(data=1, model=3)), parse_topology('v6e:3x1')),
    )


def test_a_group_along_axes():
  """Places in a mesh of 2 × 2 × 2."""
  sizes = {'data': 2, 'seq': 2, 'model': 2}
  assert group_along(('data', 'model'), sizes) == (0, 1, 4, 5)
