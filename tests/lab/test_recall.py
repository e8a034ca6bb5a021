"""Answers by distance: all of them are counted once, and right where the evaluation says so."""

import dataclasses

import jax
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.recall import MultiQuery, Recall
from deepseek_jax.lab.recall import _binned, recall_by_distance, recall_table
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.train.evaluate import evaluate
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.step import build_program

RUN = Experiment(
  name='recall',
  model=DeepSeekV3(
    depth=1,
    width=16,
    vocab=88,
    attention=MLA(heads=4, nope_dim=16, rope_dim=16, value_dim=16, latent=64),
    dense=SwiGLU(hidden=32),
    dense_layers=1,
    feed_forward=SwiGLU(hidden=32),
  ),
  data=Recall(
    task=MultiQuery(pairs=3, questions=4, power=0.9),
    values=2,
    length=45,
    batch_size=4,
    heldout_rows=11,
  ),
  optimizer=AdamW(peak_lr=1e-3),
  schedule=WarmupStableDecay(warmup_steps=1, decay_fraction=0.5),
  train_steps=10,
  balance=None,
)


@pytest.fixture(scope='module')
def model():
  """A program, fresh weights, rows."""
  program = build_program(RUN, jax.devices()[:1])
  state = program.init(jax.random.key(0))
  return program, state, program.experiment.data.prepare(None)


def test_by_distance(model):
  """Fresh weights guess: some of the answers are right, in each way of counting them the same."""
  program, state, data = model
  # Fresh weights hardly ever say a value: all other columns of the head are made nothing.
  head = state.params['head']['weight']
  allowed = np.zeros(head.shape[1], bool)
  allowed[3 + 64 : 3 + 66] = True
  params = {**state.params, 'head': {'weight': np.where(allowed, head, 0)}}
  found = recall_by_distance(program.decoder, {'params': params, 'buffers': state.buffers}, data)
  result = evaluate(program, params, state.buffers, data.heldout)
  asked = sum(x.asked for x in found)
  assert asked == result.targets == 44
  right = sum(x.asked * x.right for x in found)
  assert right / asked == pytest.approx(result.accuracy)
  assert 0.1 < result.accuracy < 0.9
  layouts = [data.heldout.row(n)[1] for n in range(11)]
  distances = [x.asked - x.given[x.pair] for x in layouts]
  counts = np.bincount(np.floor(np.log2(np.concatenate(distances))).astype(int))
  assert [x.asked for x in found] == [count for count in counts if count]
  few = recall_by_distance(program.decoder, {'params': params, 'buffers': {}}, data, rows=5)
  assert sum(x.asked for x in few) == 20
  with pytest.raises(ConfigError, match='12 rows: expected 1 to 11'):
    recall_by_distance(program.decoder, {'params': params, 'buffers': {}}, data, rows=12)


def test_bins():
  found = _binned(np.array([2, 3, 4, 7, 7, 32]), np.array([1, 0, 1, 1, 0, 1], bool))
  assert [dataclasses.astuple(x) for x in found] == [
    (2, 3, 2, 0.5),
    (4, 7, 3, pytest.approx(2 / 3)),
    (32, 63, 1, 1.0),
  ]
  assert recall_table(found).splitlines()[2] == '| 2–3 | 2 | 50.0% |'
