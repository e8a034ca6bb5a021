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
from deepseek_jax.core.tree import flatten
from deepseek_jax.data.batch import Batch
from deepseek_jax.hub import from_pretrained
from deepseek_jax.hub.pretrained import regrouped, segments_of
from deepseek_jax.infer.generate import generate
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.context import shift_left, text_context
from deepseek_jax.models.decoder import canonical, plan_segments
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT, FSDP, TENSOR
from deepseek_jax.train.objective import batch_totals, training_loss

REFERENCES = pathlib.Path(__file__).with_name('references')
CASES = ('v2_lite', 'v2', 'v3', 'v3_2', 'v4')
MESHES = {
  'fsdp': (MeshConfig(replica=2, data=4), FSDP),
  'tensor': (MeshConfig(data=4, model=2), TENSOR),
  'expert': (MeshConfig(data=4, expert=2), EXPERT),
}
FAST = {('v3', 'expert')}
LENGTHS = (7, 37, 45)
LOGITS, LOSS, GRADIENTS = 5e-5, 1e-5, 5e-5
BFLOAT16 = {'v2_lite': 0.03, 'v2': 0.035, 'v3': 0.2, 'v3_2': 0.15, 'v4': 0.02}
"""Mean error of logits in units of their standard deviation, about twice what was found. In V3 a
rounded score sends some tokens to other experts."""


@functools.cache
def load(case):
  """Reads a case: what was answered, our model and its variables, the names of its tensors."""
  with np.load(REFERENCES / case / 'answers.npz') as file:
    answers = dict(file)
  found = from_pretrained(REFERENCES / case)
  # The config speaks of layers that predict more tokens; transformers neither has nor saves them.
  assert found.manifest.without_mtp == (case in ('v3', 'v4'))
  # The gradient goes through scans, as in training.
  segments = plan_segments(found.model)
  return types.SimpleNamespace(
    answers=answers,
    model=found.model,
    variables=regrouped(found.variables, segments_of(found.decoder), segments),
    entries=as_transformers_saves(names_of(found.model).entries),
    segments=segments,
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


ON_EIGHT = [
  pytest.param(case, preset, marks=() if (case, preset) in FAST else pytest.mark.slow)
  for case in CASES
  for preset in MESHES
]


@pytest.mark.parametrize(('case', 'preset'), ON_EIGHT)
def test_on_eight_devices(case, preset):
  """Every device reads its own part of the weights; greedy continuations are the same too."""
  it = load(case)
  mesh, rules = MESHES[preset]
  found = from_pretrained(REFERENCES / case, mesh=mesh, rules=rules)
  assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(found.variables))
  got = found.logits(it.answers['tokens/37'])
  assert np.max(np.abs(got - it.answers['logits/37'])) < LOGITS
  prompt, want = it.answers['prompts/1'].tolist(), it.answers['greedy/1'].tolist()
  assert generate(found.decoder, found.variables, [prompt], max_new_tokens=len(want)) == [want]


@pytest.mark.parametrize('case', [*CASES[:-1], pytest.param('v4', marks=pytest.mark.slow)])
def test_in_bfloat16(case):
  """Eight bits of precision: what is chosen may differ, so that the mean is bounded."""
  it = load(case)
  found = from_pretrained(REFERENCES / case, dtype='bfloat16')
  want = it.answers['logits/45']
  error = np.abs(np.asarray(found.logits(it.answers['tokens/45'])) - want)
  assert np.mean(error) < BFLOAT16[case] * np.std(want)


@pytest.mark.parametrize('case', CASES)
def test_the_way_back(case, tmp_path):
  """What is exported has the tensors that transformers wrote, under the hub's names."""
  list(from_pretrained(REFERENCES / case).export(tmp_path / case))
  ours, theirs = open_folder(tmp_path / case), open_folder(REFERENCES / case)
  entries = names_of(load(case).model).entries
  saved = as_transformers_saves(entries)
  names = {
    hub: name
    for entry, other in zip(entries, saved, strict=True)
    for hub, name in zip(entry.theirs, other.theirs, strict=True)
  }
  assert ours.keys() == names.keys()
  for hub, name in names.items():
    assert ours[hub].dtype == theirs[name].dtype, hub
    np.testing.assert_array_equal(ours[hub].whole(), theirs[name].whole(), err_msg=hub)
  assert_same_config(tmp_path / case, REFERENCES / case)


def assert_same_config(ours, theirs):
  """Both describe one model, and transformers' own fields that are in both are equal."""
  ours, theirs = (
    json.loads((folder / 'config.json').read_text(encoding='utf-8')) for folder in (ours, theirs)
  )
  assert dataclasses.replace(model_of(theirs), mtp=None) == model_of(ours)
  differing = {
    name: (ours[name], theirs[name])
    for name in ours.keys() & theirs.keys()
    if ours[name] != theirs[name]
  }
  assert differing.keys() <= {'rope_parameters', 'num_nextn_predict_layers', 'mlp_layer_types'}
