"""Small experiments whose cost is easy to say, and questions about them."""

import dataclasses
import pathlib
from collections.abc import Callable

import pytest

from configs import tiny_mla
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.train.experiment import Experiment

HEAD = """
from configs import tiny_mla
from deepseek_jax.core.override import override
from deepseek_jax.core.sweep import chain, product, seeds, zipped
from deepseek_jax.lab.match import ActiveParameters, FlopsPerToken, WallClock
from deepseek_jax.layers.feed_forward import SwiGLU

SMALL = {
  'model.depth': 2, 'model.width': 16, 'model.mtp': None, 'model.dense': SwiGLU(hidden=8),
  'model.dense_layers': 2, 'data.length': 16,
}

def base():
  return override(tiny_mla.get_config(), SMALL)[0]
"""


@pytest.fixture
def small() -> Experiment:
  """A run with one dense layer after the other."""
  base = tiny_mla.get_config()
  model = dataclasses.replace(
    base.model, depth=2, width=16, mtp=None, dense=SwiGLU(hidden=8), dense_layers=2
  )
  return dataclasses.replace(base, model=model, data=dataclasses.replace(base.data, length=16))


@pytest.fixture
def write_question(tmp_path) -> Callable[..., pathlib.Path]:
  """Writes `question/sweep.py` with `base()` and the lines given."""

  def write(text: str, name: str = 'question', head: str = HEAD) -> pathlib.Path:
    (tmp_path / name).mkdir(exist_ok=True)
    file = tmp_path / name / 'sweep.py'
    file.write_text(head + text)
    return file

  return write
