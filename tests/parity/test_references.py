"""Our models read folders that transformers wrote, and answer what it answers.

`scripts/make_references.py` says what is in the folders and how they were made. Differences are in
units of the largest number, logits and losses apart, which are of size 1.
"""

import dataclasses
import functools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.convert.architecture import model_of
from deepseek_jax.convert.lazy import stored
from deepseek_jax.convert.names import as_transformers_saves, names_of
from deepseek_jax.convert.safetensors import open_folder
from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.infer.generate import generate
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.context import text_context
from deepseek_jax.models.decoder import canonical, grouped, plan_segments, shift_left
from deepseek_jax.train.objective import batch_totals, training_loss

REFERENCES = pathlib.Path(__file__).with_name('references')
CASES = ('v2_lite', 'v2', 'v3', 'v3_2', 'v4')
LENGTHS = (7, 37, 45)
LOGITS, LOSS, GRADIENTS = 5e-5, 1e-5, 5e-5


def variables_of(folder):
  """Returns the model of a folder, the entries of its weights, and these at canonical addresses."""
  tensors = open_folder(folder)
  model = model_of(json.loads((folder / 'config.json').read_text(encoding='utf-8')))
  if model.mtp is not None:
    # The config speaks of layers that predict more tokens; transformers neither has nor saves them.
    assert not any('.eh_proj.' in name or name.startswith('mtp.') for name in tensors)
    model = dataclasses.replace(model, mtp=None)
  entries = as_transformers_saves(names_of(model).entries)
  assert sorted(tensors) == sorted(name for entry in entries for name in entry.theirs)
  flat = {
    entry.ours: entry.form.ours([tensors[name] for name in entry.theirs]).whole()
    for entry in entries
  }
  return model, entries, {'params': {}, 'buffers': {}} | unflatten(flat)


@functools.cache
def load(case):
  """Reads a case: what was answered, our model and its variables, grouped into scans."""
  with np.load(REFERENCES / case / 'answers.npz') as file:
    answers = dict(file)
  model, entries, variables = variables_of(REFERENCES / case)
  segments = plan_segments(model)
  variables = jax.tree.map(jnp.asarray, {k: grouped(v, segments) for k, v in variables.items()})
  return types.SimpleNamespace(
    answers=answers, model=model, entries=entries, variables=variables, segments=segments
  )


@pytest.fixture(scope='module', autouse=True)
def _hurry():
  """Programs that run once: more time goes into compiling than into running."""
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', before)


def logits_of(model, variables, tokens):
  """Returns our logits [B, T, V]."""
  decoder, context = model.build(), text_context(tokens)
  read = jax.jit(lambda variables: decoder.apply(variables, context, method='everything'))
  return np.asarray(read(variables))


def learn(model, variables, tokens):
  """Returns the loss as training has it, and its gradients by `params`."""
  decoder, context = model.build(), text_context(tokens)
  batch = Batch(
    tokens=tokens,
    targets=shift_left(tokens, 1),
    weights=jnp.ones(tokens.shape, jnp.float32).at[:, -1].set(0),
    positions=context.positions,
    segments=context.segments,
    documents=jnp.zeros_like(tokens),
  )

  def loss(params):
    totals = batch_totals(batch, 0)
    _, (scalars, _) = training_loss(
      decoder, {**variables, 'params': params}, batch, totals, jnp.float32(0), context, chunk=5
    )
    return scalars['loss']

  return jax.jit(jax.value_and_grad(loss))(variables['params'])


@pytest.mark.parametrize('length', LENGTHS)
@pytest.mark.parametrize('case', CASES)
def test_logits_and_loss(case, length):
  it = load(case)
  tokens, want = it.answers[f'tokens/{length}'], it.answers[f'logits/{length}']
  got = logits_of(it.model, it.variables, jnp.asarray(tokens))
  assert got.shape == want.shape
  assert np.max(np.abs(got - want)) < LOGITS
  ahead = jax.nn.log_softmax(got[:, :-1])
  loss = -np.mean(np.take_along_axis(ahead, tokens[:, 1:, None], axis=-1))
  assert abs(loss - it.answers[f'loss/{length}']) < LOSS


@pytest.mark.parametrize('case', CASES)
def test_gradient_of_every_weight(case):
  it = load(case)
  loss, slopes = learn(it.model, it.variables, jnp.asarray(it.answers['tokens/37']))
  assert abs(loss - it.answers['loss/37']) < LOSS
  slopes = flatten({'params': canonical(slopes, it.segments)})
  wanted = {k.removeprefix('gradients/'): v for k, v in it.answers.items() if 'gradients/' in k}
  learnt = [entry for entry in it.entries if entry.ours in slopes]
  assert {entry.ours for entry in learnt} == set(slopes)
  for entry in learnt:
    if entry.theirs[0] not in wanted:
      # The text teaches an indexer nothing.
      assert 'index' in entry.ours
      assert not np.any(slopes[entry.ours]), entry.ours
      continue
    parts = entry.form.theirs(stored(np.asarray(slopes[entry.ours])))
    for name, part in zip(entry.theirs, parts, strict=True):
      want, got = wanted.pop(name), part.whole()
      assert got.shape == want.shape, name
      error = np.max(np.abs(got - want)) / np.max(np.abs(want))
      assert error < GRADIENTS, f'{name}: off by {error:.1e} of the largest value'
  assert not wanted


@pytest.mark.parametrize('case', CASES)
def test_greedy_continuations(case):
  """Prompts of many lengths at once, through our caches."""
  it = load(case)
  count = sum(name.startswith('prompts/') for name in it.answers)
  prompts = [it.answers[f'prompts/{place}'].tolist() for place in range(count)]
  wanted = [it.answers[f'greedy/{place}'].tolist() for place in range(count)]
  assert len({tuple(row) for row in wanted}) == count > 3
  assert any(len(set(row)) > 4 for row in wanted)
  got = generate(it.model.build(), it.variables, prompts, max_new_tokens=len(wanted[0]))
  assert got == wanted


def test_a_wrong_model_is_noticed():
  """For what else each reference would notice, see `matters` in the script that made them."""
  it = load('v2_lite')
  attention = dataclasses.replace(it.model.attention, rope=RoPE(theta=100.0))
  wrong = dataclasses.replace(it.model, attention=attention)
  got = logits_of(wrong, it.variables, jnp.asarray(it.answers['tokens/37']))
  assert np.max(np.abs(got - it.answers['logits/37'])) > 1000 * LOGITS
