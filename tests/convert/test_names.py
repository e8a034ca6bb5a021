"""Every weight has a name, and lies there so that it comes back the same."""

import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import quickstart, tiny_dsa, tiny_gated, tiny_mla, tiny_v2, tiny_v4
from deepseek_jax.convert.lazy import stored
from deepseek_jax.convert.names import as_in_transformers, as_transformers_saves, names_of
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.load import load_config
from deepseek_jax.core.override import override
from deepseek_jax.core.tree import flatten
from deepseek_jax.models.decoder import canonical, init_variables, plan_segments

RELEASED = ('v2_lite', 'v2_236b', 'v3_671b', 'v3_2_671b', 'kimi_k2', 'v4_flash', 'v4_pro')


def shapes_of(model):
  """Shapes of all weights and buffers by canonical address."""
  decoder = model.build()
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  segments = plan_segments(model)
  return flatten({name: canonical(tree, segments) for name, tree in nn.unbox(boxed).items()})


@pytest.mark.parametrize('name', RELEASED)
def test_every_weight_has_one_name(name):
  model = load_config(name).model
  entries = names_of(model).entries
  ours = [entry.ours for entry in entries]
  theirs = [tensor for entry in entries for tensor in entry.theirs]
  assert len(set(ours)) == len(ours)
  assert len(set(theirs)) == len(theirs)
  assert set(ours) == set(shapes_of(model))


def test_tensors_of_the_released_files():
  """As many as the published index has: of V3 with FP8 scales and copies; of V4 with scales."""
  plain, copies = names_of(load_config('v3_671b').model)
  theirs = [name for entry in plain for name in entry.theirs]
  scaled = re.compile(r'(?<!eh)_proj\.weight$|kv_a_proj_with_mqa\.weight$')
  count = len(theirs) + sum(bool(scaled.search(name)) for name in theirs) + len(copies)
  assert count == 91_991
  theirs = [t for entry in names_of(load_config('v4_flash').model).entries for t in entry.theirs]
  scaled = re.compile(r'\.(wq_[ab]|attn\.wkv|wo_[ab]|w[123]|[eh]_proj)\.weight$')
  assert len(theirs) + sum(bool(scaled.search(name)) for name in theirs) == 69_187


TINY = {
  'v2': tiny_v2.get_config,
  'v3': tiny_mla.get_config,
  'v3_2': tiny_dsa.get_config,
  'v4': tiny_v4.get_config,
}


@pytest.mark.parametrize('name', TINY)
def test_there_and_back(name):
  """Linear maps are turned and heads put side by side; nothing is lost."""
  model = TINY[name]().model
  rng = np.random.default_rng(0)
  ours = {
    address: rng.standard_normal(leaf.shape).astype(np.float32)
    for address, leaf in shapes_of(model).items()
  }
  published = {}
  for entry in names_of(model).entries:
    parts = entry.form.theirs(stored(ours[entry.ours]))
    assert len(parts) == len(entry.theirs)
    published |= zip(entry.theirs, (part.whole() for part in parts), strict=True)
  for entry in names_of(model).entries:
    back = entry.form.ours([stored(published[tensor]) for tensor in entry.theirs])
    assert back.shape == ours[entry.ours].shape
    np.testing.assert_array_equal(back.whole(), ours[entry.ours])


def test_transformers_names_of_v4():
  entries = as_in_transformers(names_of(tiny_v4.get_config().model).entries)
  names = {name for entry in entries for name in entry.theirs}
  assert len(names) == sum(len(entry.theirs) for entry in entries)
  for name in (
    'model.embed_tokens.weight',
    'lm_head.weight',
    'model.norm.weight',
    'model.hc_head.hc_fn',
    'model.layers.0.attn_hc.base',
    'model.layers.0.ffn_hc.scale',
    'model.layers.0.input_layernorm.weight',
    'model.layers.0.post_attention_layernorm.weight',
    'model.layers.0.self_attn.sinks',
    'model.layers.0.self_attn.q_a_proj.weight',
    'model.layers.0.self_attn.q_a_norm.weight',
    'model.layers.0.self_attn.q_b_proj.weight',
    'model.layers.0.self_attn.kv_proj.weight',
    'model.layers.0.self_attn.kv_norm.weight',
    'model.layers.0.self_attn.o_a_proj.weight',
    'model.layers.0.mlp.gate.tid2eid',
    'model.layers.2.mlp.gate.e_score_correction_bias',
    'model.layers.2.mlp.experts.3.gate_proj.weight',
    'model.layers.2.mlp.shared_experts.down_proj.weight',
    'model.layers.2.self_attn.compressor.kv_norm.weight',
    'model.layers.2.self_attn.compressor.position_bias',
    'model.layers.2.self_attn.compressor.gate_proj.weight',
    'model.layers.2.self_attn.compressor.indexer.kv_proj.weight',
    'model.layers.2.self_attn.compressor.indexer.kv_norm.weight',
    'model.layers.2.self_attn.compressor.indexer.q_b_proj.weight',
    'model.layers.2.self_attn.compressor.indexer.scorer.weights_proj.weight',
  ):
    assert name in names, name


def test_names_that_transformers_saves():
  """Of V4 a mixture of its own and the hub's; all others are the hub's. See parity/references."""
  hub = [t for e in names_of(tiny_v4.get_config().model).entries for t in e.theirs]
  saved = as_transformers_saves(names_of(tiny_v4.get_config().model).entries)
  names = dict(zip(hub, (t for e in saved for t in e.theirs), strict=True))
  assert len(set(names.values())) == len(names)
  for theirs, want in (
    ('embed.weight', 'model.embed_tokens.weight'),
    ('head.weight', 'head.weight'),
    ('norm.weight', 'model.norm.weight'),
    ('hc_head_fn', 'model.hc_head.hc_fn'),
    ('layers.0.hc_attn_base', 'model.layers.0.hc_attn_base'),
    ('layers.0.attn.kv_norm.weight', 'model.layers.0.attn.norm.weight'),
    ('layers.0.attn_norm.weight', 'model.layers.0.attn_norm.weight'),
    ('layers.2.attn.compressor.norm.weight', 'model.layers.2.attn.compressor.norm.weight'),
  ):
    assert names[theirs] == want
  entries = names_of(tiny_mla.get_config().model).entries
  assert as_transformers_saves(entries) == entries


@pytest.mark.parametrize(
  ('model', 'message'),
  [
    (tiny_gated.get_config().model, 'attention Gated: no released model has it'),
    (
      override(quickstart.get_config(), {'model.feed_forward.router': 'Balanced()'})[0].model,
      'router Balanced: no released model has it',
    ),
  ],
)
def test_what_was_never_released(model, message):
  with pytest.raises(ConfigError, match=message):
    names_of(model)
