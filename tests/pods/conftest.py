"""Small compiled programs that several tests read."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import pytest

from configs import tiny_mla
from deepseek_jax.core.override import override
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.models.remat import EveryLayer
from deepseek_jax.pods import hlo
from deepseek_jax.pods.topology import Build, Topology, compile_program
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.step import Program, build_program


@pytest.fixture(scope='session')
def compiled() -> Callable[..., tuple[hlo.Module, Any]]:
  """Compiles a function for arguments or their shapes; returns the module read, and JAX's own."""

  def read(function: Callable[..., Any], *arguments: Any, **options: Any):
    found = jax.jit(function, **options).lower(*arguments).compile()
    return hlo.parse(found.as_text()), found

  return read


SLICE = Topology(generation='v6e', shape=(4, 2))
"""As many devices as a test has."""


def shrunk(**changes: Any) -> Experiment:
  """A dense model, wide for its few tokens, so that nearly all it does are products."""
  base = tiny_mla.get_config()
  sizes = {'heads': 8, 'nope_dim': 32, 'rope_dim': 8, 'value_dim': 32, 'latent': 64}
  model = dataclasses.replace(
    base.model,
    depth=4,
    width=256,
    attention=MLA(**sizes, query_latent=None),
    dense_layers=4,
    dense=SwiGLU(hidden=1024),
    mtp=None,
  )
  # Rows so short that attention is nearly nothing: a CPU does not leave out what is masked.
  data = dataclasses.replace(base.data, length=16, batch_size=64)
  return override(
    dataclasses.replace(base, model=model, data=data), {'remat': EveryLayer(), **changes}
  )[0]


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A training step, compiled here."""

  program: Program
  build: Build


@pytest.fixture(scope='session')
def training() -> Compiled:
  """Two microbatches of a dense model, its weights cut over eight devices."""
  experiment = shrunk(mesh=MeshConfig(data=8), microbatches=2)
  program = build_program(experiment, jax.devices())
  state, batch = program.abstract_state, program.abstract_batch()
  return Compiled(program, compile_program(lambda: program.step.lower(state, batch)))


@pytest.fixture(scope='session')
def small_slice() -> Topology:
  """A slice with as many devices as a test has."""
  return SLICE


@pytest.fixture(scope='session')
def shrink() -> Callable[..., Experiment]:
  """Makes the dense model, with changes."""
  return lambda **changes: shrunk(**changes)
