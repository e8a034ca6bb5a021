"""Small compiled programs that several tests read."""

from collections.abc import Callable
from typing import Any

import jax
import pytest

from deepseek_jax.pods import hlo


@pytest.fixture(scope='session')
def compiled() -> Callable[..., tuple[hlo.Module, Any]]:
  """Compiles a function for arguments or their shapes; returns the module read, and JAX's own."""

  def read(function: Callable[..., Any], *arguments: Any, **options: Any):
    found = jax.jit(function, **options).lower(*arguments).compile()
    return hlo.parse(found.as_text()), found

  return read
