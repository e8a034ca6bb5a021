"""Precisions as kinds."""

import dataclasses

import jax.numpy as jnp
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override_from_text
from deepseek_jax.core.precision import BFloat16, Fastest, Float16, Float32, Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  precision: Precision = Float32()


@pytest.mark.parametrize(
  ('text', 'dtype'),
  [('Float32', jnp.float32), ('BFloat16', jnp.bfloat16), ('Float16', jnp.float16)],
)
def test_compute_dtype(text, dtype):
  run, _ = override_from_text(Run(), {'precision': text})
  assert jnp.dtype(run.precision.compute) == dtype
  # float16 alone has so little range that its gradients need a factor.
  assert (run.precision.scaling is not None) == (dtype == jnp.float16)


def test_fastest_has_none_before_it_is_measured():
  run, _ = override_from_text(Run(), {'precision': 'Fastest()'})
  assert run.precision == Fastest()
  with pytest.raises(ConfigError, match='until it is measured'):
    _ = run.precision.compute


def test_kinds_differ():
  assert len({Float32(), BFloat16(), Float16(), Fastest(), Float32()}) == 4
