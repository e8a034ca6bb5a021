"""Every config's training step is ready for TPU, CUDA and ROCm: it lowers for them here, without.

A config whose mesh needs more devices than the eight of the tests gets a small mesh with the same
rules; everything else is as the config says.
"""

import dataclasses
import functools
import math
import pathlib
import re

import jax
import jax.export
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.load import load_config
from deepseek_jax.core.precision import BFloat16
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.train.experiment import resolved
from deepseek_jax.train.step import Program, build_program

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'configs'
CONFIGS = sorted(path.stem for path in FOLDER.glob('*.py') if path.stem != '__init__')
GPUS = ('cuda', 'rocm')
OFTEN = ('tiny_mla', 'tiny_v4', 'quickstart', 'v3_671b')
"""Configs that are lowered every time; between them they have most kinds of layers."""
NAMES = [pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.slow]) for name in CONFIGS]

RAGGED = 'composite "chlo.ragged_dot"'
"""The grouped matrix product of a GPU, as it stands in a module."""
KERNEL = 'tpu_custom_call'
"""That of a TPU."""
EXCHANGE = 'ragged_all_to_all'
"""Rows that travel as many as they are; there is no such thing for CPU."""
BLOCKS = re.compile(r'loc\("(?:[^"]*/)?experts/[^"]*while')
"""The loop over blocks of tokens that is for CPU alone, in the names of a module's operations."""


@functools.cache
def program(name: str) -> Program:
  """The program of a config, on its own mesh where eight devices or fewer can be that."""
  # `Fastest` is measured at the start of a run; on an accelerator it would be bfloat16.
  experiment = resolved(load_config(FOLDER / f'{name}.py'), BFloat16())
  if experiment.mesh.data is None:
    rows = experiment.data.batch_size // experiment.microbatches
    return build_program(experiment, jax.devices()[: math.gcd(8, rows)])
  try:
    experiment.mesh.sizes(8)
  except ConfigError:
    experiment = dataclasses.replace(experiment, mesh=MeshConfig(data=2, expert=4))
  return build_program(experiment)


def lowered(name: str, platforms: tuple[str, ...]) -> jax.export.Exported:
  """The training step of a config for some platforms."""
  made = program(name)
  with jax.set_mesh(made.mesh):
    # What is exported is read here, and nowhere run by another version.
    allowed = [jax.export.DisabledSafetyCheck.custom_call(EXCHANGE)]
    export = jax.export.export(made.step.function, platforms=platforms, disabled_checks=allowed)
    return export(made.abstract_state, made.abstract_batch(), *made.step.constants)


def experts(name: str) -> list[MoE]:
  """The mixtures of experts of a config's layers."""
  found = [block.feed_forward for block in program(name).experiment.model.layers()]
  return [layer for layer in found if isinstance(layer, MoE)]


def exchanges(name: str) -> bool:
  """Whether tokens travel to their experts."""
  return any(isinstance(layer.dispatch, AllToAll) for layer in experts(name))


def test_there_are_configs():
  """The folder is read from where it is."""
  assert {'quickstart', 'tiny_mla', 'v3_671b'} <= set(CONFIGS)


@pytest.mark.parametrize('name', CONFIGS)
def test_a_config_is_right_on_its_own_devices(name):
  """On as many as its mesh has, which are not here."""
  experiment = load_config(FOLDER / f'{name}.py')
  sizes = dataclasses.asdict(experiment.mesh).values()
  assert not experiment.check(math.prod(size or 1 for size in sizes))


@pytest.mark.parametrize('name', NAMES)
def test_gpu(name):
  """One module for both kinds, with their grouped product and without the CPU's loop."""
  exported = lowered(name, GPUS)
  assert exported.platforms == GPUS
  assert exported.nr_devices == program(name).mesh.size
  text = exported.mlir_module()
  assert (RAGGED in text) == bool(experts(name))
  assert KERNEL not in text
  assert (EXCHANGE in text) == exchanges(name)
  assert not BLOCKS.search(text)


@pytest.mark.parametrize('name', NAMES)
def test_tpu(name):
  """A module of its own, with Pallas kernels: no other platform can be in one with those."""
  text = lowered(name, ('tpu',)).mlir_module()
  assert (KERNEL in text) or not experts(name)
  assert RAGGED not in text
  assert (EXCHANGE in text) == exchanges(name)
  assert not BLOCKS.search(text)


@pytest.mark.parametrize('name', NAMES)
def test_cpu(name):
  """The other way round: the loop, and no grouped product, which CPU would run expert by expert."""
  text = lowered(name, ('cpu',)).mlir_module()
  assert bool(BLOCKS.search(text)) == bool(experts(name))
  assert 'ragged_dot' not in text
  assert KERNEL not in text


def test_the_step_is_whole():
  """What is lowered takes state, batch and numbers and returns the state, in its shards."""
  exported = lowered('tiny_mla', GPUS)
  made = program('tiny_mla')
  state = jax.tree.leaves(made.abstract_state)
  numbers = jax.tree.leaves(made.step.constants)
  assert len(numbers) == 5
  assert len(exported.in_avals) == len(state) + 6 + len(numbers)
  assert [(a.shape, a.dtype) for a in exported.out_avals[: len(state)]] == [
    (leaf.shape, leaf.dtype) for leaf in state
  ]
  assert made.mesh.size == 8
