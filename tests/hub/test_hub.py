"""A trained model is loaded whole, changed in part, and trained further."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.serialise import to_json
from deepseek_jax.core.tree import flatten
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.hub import Pretrained, from_pretrained
from deepseek_jax.hub.pretrained import regrouped, run_segments, segments_of
from deepseek_jax.infer.sample import Sample
from deepseek_jax.infer.speculate import Speculate
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.layers.context import text_context
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.models.decoder import canonical, plan_segments
from deepseek_jax.models.mtp import MTP
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.state import fresh_state

SIZES = {'heads': 2, 'nope_dim': 8, 'rope_dim': 4, 'value_dim': 8, 'latent': 16}


def by_address(model: Pretrained):
  segments = plan_segments(model.decoder.config, model.decoder.remat)
  return flatten({name: canonical(tree, segments) for name, tree in model.variables.items()})


def apply(model: Pretrained, tokens):
  def forward(module, context):
    return module.logits(module(context)[0], context)

  context = text_context(jnp.asarray([tokens]))
  return model.decoder.apply(model.variables, context, method=forward)[0]


def as_saved(model):
  """The weights of a model, grouped as in the checkpoints of its run."""
  return regrouped(model.variables, segments_of(model.decoder), run_segments(model.experiment))


def test_logits_are_those_of_the_saved_weights(workdir, experiment, variables):
  """From the workdir or from its checkpoints, for text or for tokens."""
  model = from_pretrained(workdir)
  assert (model.step, model.experiment, model.fresh) == (9, experiment, ())
  jax.tree.map(np.testing.assert_array_equal, as_saved(model), variables)
  tokens = [0, *Bytes().build().encode('Number').tolist()]
  logits = model.logits('Number')
  assert logits.shape == (7, 264)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, apply(model, tokens), atol=1e-4)
  np.testing.assert_array_equal(from_pretrained(workdir / 'checkpoints').logits(tokens), logits)
  assert not np.any(from_pretrained(workdir, step=7).logits(np.array(tokens)))


def test_text_goes_on(workdir):
  """The same seed gives the same text, and the stream is the text."""
  model = from_pretrained(workdir)
  text = model.generate('The ', max_new_tokens=8, sampler=Sample(), seed=1)
  assert text
  assert ''.join(model.stream('The ', 8, Sample(), 1)) == text
  assert model.generate('The ', max_new_tokens=8, sampler=Sample(), seed=2) != text
  assert model.generator.complete(['The '], max_new_tokens=8, sampler=Sample(), seed=1) == [text]


@pytest.mark.slow
def test_drafts_need_modules(workdir):
  """A model without them says so at once; one with them gives the same text."""
  model = from_pretrained(workdir)
  with pytest.raises(ConfigError, match='found `mtp` None'):
    model.stream('The ', decoding=Speculate())
  model = model.replace(mtp=MTP(depth=1))
  plain = model.generate('The ', max_new_tokens=8)
  assert model.generate('The ', max_new_tokens=8, decoding=Speculate()) == plain


def test_another_attention_keeps_the_weights(workdir):
  """All kinds of a family share theirs; the result is what that kind makes of them."""
  model = from_pretrained(workdir)
  changed = model.replace(attention='Window(size=3, sinks=1)')
  assert changed.experiment.model.attention == Window(**SIZES, size=3, sinks=1)
  assert changed.fresh == ()
  assert (changed.step, model.step) == (0, 9)
  jax.tree.map(np.testing.assert_array_equal, changed.variables, model.variables)
  text = 'A longer text'
  assert np.abs(changed.logits(text) - model.logits(text)).max() > 0.01
  back = changed.replace(attention=MLA(**SIZES))
  np.testing.assert_allclose(back.logits(text), model.logits(text), atol=1e-5)


def test_what_is_new_is_fresh_and_listed(workdir):
  """A gate has weights that the model had not; everything else is kept, through regrouping too."""
  model = from_pretrained(workdir)
  changed = model.replace(
    attention='Gated(keep=Share(share=0.5))', depth=3, dense=SwiGLU(hidden=40)
  )
  old, new = by_address(model), by_address(changed)
  expected = {f'params/layers/{i}/attention/gate' for i in range(3)}
  expected |= {f'params/layers/0/feed_forward/{name}' for name in ('gate', 'up', 'down')}
  assert set(changed.fresh) == expected
  assert set(new) - set(old) == {f'params/layers/{i}/attention/gate' for i in range(3)}
  kept = set(new) - expected
  assert len(kept) > 20
  for address in kept:
    np.testing.assert_array_equal(new[address], old[address])
  assert all(np.any(new[address]) for address in expected)
  assert changed.logits('abc').shape == (4, 264)
  # What no step has trained stays listed when something else is changed.
  again = changed.replace(attention='Gated(keep=Share(share=0.9))')
  assert set(again.fresh) == expected
  jax.tree.map(np.testing.assert_array_equal, again.variables, changed.variables)
  assert set(changed.replace(attention=MLA(**SIZES)).fresh) == {a for a in expected if 'feed' in a}


def test_a_model_may_lose_all_its_buffers(workdir):
  """Dense layers have none."""
  changed = from_pretrained(workdir).replace(feed_forward=SwiGLU(hidden=48))
  assert changed.variables['buffers'] == {}
  assert len(changed.fresh) == 12
  assert changed.logits('abc').shape == (4, 264)


def test_wrong_changes_are_refused(workdir):
  """By the name of the part."""
  with pytest.raises(ConfigError, match='depht'):
    from_pretrained(workdir).replace(depht=3)


@pytest.mark.slow
def test_training_goes_on(workdir, cache_dir):
  """Losses fall from that of the weights; the model they started from stays whole."""
  # Two layers compile sooner than five.
  model = dataclasses.replace(from_pretrained(workdir).replace(depth=2), step=9)
  before = jax.tree.map(np.asarray, model.variables)
  trained, losses = model.train(steps=6, cache_dir=cache_dir)
  jax.tree.map(np.testing.assert_array_equal, model.variables, before)
  assert trained.step == 15
  assert len(losses) == 6
  assert losses[-1] < losses[0] - 0.2
  # The first loss is that of the weights as they were, on batch 9.
  (batch,) = (b for b, _ in zip(model.experiment.data.prepare(cache_dir).train_batches(9), [0]))
  expected = reference_loss(model, batch)
  assert abs(losses[0] - expected) < 1e-3 * expected
  text = trained.generate('The number ', max_new_tokens=4)
  assert isinstance(text, str)
  assert trained.logits('The').shape == (4, 264)
  with pytest.raises(ConfigError, match='steps: found 0'):
    model.train(steps=0)


def reference_loss(model, batch):
  """Mean nats a target, one document at a time."""
  nats, targets = 0.0, 0
  for row in range(batch.tokens.shape[0]):
    for segment in range(1, int(batch.segments[row].max()) + 1):
      place = np.flatnonzero(batch.segments[row] == segment)
      logits = np.asarray(model.logits(batch.tokens[row, place].tolist()), np.float64)
      log_mass = np.log(np.exp(logits).sum(-1))
      nats += (log_mass - logits[np.arange(len(place)), batch.targets[row, place]]).sum()
      targets += len(place)
  return nats / targets


def test_what_cannot_be_loaded_is_refused(workdir, experiment, variables, tmp_path):
  """No checkpoint, no such step, weights of another model, a config of something else."""
  with pytest.raises(ConfigError, match="expected a run's workdir"):
    from_pretrained(tmp_path)
  with pytest.raises(ConfigError, match='no checkpoint of step 8; there are 7, 9'):
    from_pretrained(workdir, step=8)
  other = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, width=16))
  state = fresh_state(variables['params'], variables['buffers'], ())
  for folder, config in (('a', to_json(other)), ('b', to_json(experiment.model))):
    with Checkpoints(tmp_path / folder) as checkpoints:
      checkpoints.save(1, state, {'step': 1}, config)
  with pytest.raises(ConfigError, match=r'arrays differ'):
    from_pretrained(tmp_path / 'a')
  with pytest.raises(ConfigError, match='its config is no Experiment but DeepSeekV3'):
    from_pretrained(tmp_path / 'b')


def test_averaged_weights_are_taken_where_there_are_any(experiment, variables, tmp_path):
  """Unless the raw ones are asked for."""
  average = jax.tree.map(lambda x: x + 1, variables['params'])
  state = fresh_state(variables['params'], variables['buffers'], (), ema=average)
  with Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    checkpoints.save(3, state, {'step': 3}, to_json(experiment))
  for weights, expected in ((None, average), ('averaged', average), ('raw', variables['params'])):
    found = from_pretrained(tmp_path, weights=weights)
    jax.tree.map(np.testing.assert_array_equal, as_saved(found)['params'], expected)
