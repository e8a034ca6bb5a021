"""Small experiments, questions about them, a trial, models with weights away from their start."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_mla
from deepseek_jax import lab
from deepseek_jax.core.override import override
from deepseek_jax.data.batch import Batch
from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.data.source import TextFiles
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.decoder import init_variables
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.train.experiment import Experiment

SIZES = {'heads': 2, 'nope_dim': 6, 'rope_dim': 4, 'value_dim': 5, 'latent': 8}
STEPS = 8
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


@pytest.fixture(scope='session')
def experiment(tmp_path_factory) -> Experiment:
  """One dense layer, then two layers of experts that share a scan."""
  text = tmp_path_factory.mktemp('text')
  for number in range(40):
    sentence = f'The number {number} is followed by the number {number + 1}. '
    cut = 70 + 13 * (number % 9)
    (text / f'{number}.txt').write_text((sentence * 4)[:cut], encoding='utf-8')
  return Experiment(
    name='tiny',
    model=DeepSeekV3(
      depth=3,
      width=16,
      vocab=264,
      attention=MLA(**SIZES),
      dense=SwiGLU(hidden=12),
      feed_forward=MoE(experts=6, top_k=2, hidden=8),
    ),
    data=TextCorpus(source=TextFiles(f'{text}/*.txt'), tokenizer=Bytes(), length=32, batch_size=4),
    optimizer=AdamW(peak_lr=1e-2),
    schedule=WarmupStableDecay(warmup_steps=2, decay_fraction=0.5),
    train_steps=STEPS,
  )


@pytest.fixture(scope='session')
def trial(cache_dir) -> lab.Trial:
  """Two seeds of a few steps, of the run that the tests of notebooks begin with.

  Compiling takes nearly all of the time, and a run that is equal is compiled once.
  """
  changes = {'model.mtp': None, 'model.depth': 1, 'model.dense_layers': 0}
  short, _ = override(tiny_mla.get_config(), changes)
  return lab.train(short, steps=STEPS, seeds=2, heldout_batches=2, cache_dir=cache_dir)


@pytest.fixture(scope='session')
def make_model(experiment) -> Callable[..., lab.Pretrained]:
  """Makes a model of the run with fields of its family changed; all weights are random."""

  def make(**changes: Any) -> lab.Pretrained:
    changed = dataclasses.replace(
      experiment, model=dataclasses.replace(experiment.model, **changes)
    )
    decoder = changed.model.build()
    boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
    noise = np.random.default_rng(7)

    def draw(path, leaf):
      values = noise.standard_normal(leaf.shape).astype(np.float32)
      if path[-1].key in ('scale', 'selection_bias'):
        return jnp.asarray(0.2 * values + (path[-1].key == 'scale'))
      return jnp.asarray(0.3 * values)

    variables = jax.tree_util.tree_map_with_path(draw, nn.meta.unbox(boxed))
    return lab.Pretrained(experiment=changed, variables=variables)

  return make


@pytest.fixture(scope='session')
def model(make_model) -> lab.Pretrained:
  """The model of the run."""
  return make_model()


@pytest.fixture(scope='session')
def packed(experiment, cache_dir) -> Batch:
  """Held-out rows: one that begins with bos, one of two documents, and padding."""
  data = experiment.data.prepare(cache_dir)
  rows = [data.heldout.row(i) for i in range(data.heldout.rows)]
  begins = next(i for i, row in enumerate(rows) if row.tokens[0] == data.tokenizer.bos)
  batch = data.heldout.batch([begins, begins + 1, -1])
  # The held-out documents are long, and few rows hold two: one is cut in two here.
  segments, positions = np.array(batch.segments), np.array(batch.positions)
  cut = segments.shape[1] // 3
  segments[1, cut:], positions[1, cut:] = 2, np.arange(segments.shape[1] - cut)
  return dataclasses.replace(batch, segments=segments, positions=positions)


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
