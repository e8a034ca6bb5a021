"""Published configs describe the models of `configs/`, and say clearly what no model here does."""

import dataclasses

import pytest

from deepseek_jax.convert.architecture import model_of
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.load import load_config
from deepseek_jax.layers.moe.dispatch.local import Local
from deepseek_jax.models.deepseek_v4 import DeepSeekV4

YARN = {
  'type': 'yarn',
  'factor': 40,
  'original_max_position_embeddings': 4096,
  'beta_fast': 32,
  'beta_slow': 1,
}
LATENT = {
  'hidden_act': 'silu',
  'kv_lora_rank': 512,
  'moe_layer_freq': 1,
  'qk_nope_head_dim': 128,
  'qk_rope_head_dim': 64,
  'rms_norm_eps': 1e-06,
  'rope_theta': 10000,
  'tie_word_embeddings': False,
  'v_head_dim': 128,
}
V2_LITE = {
  **LATENT,
  'model_type': 'deepseek_v2',
  'first_k_dense_replace': 1,
  'hidden_size': 2048,
  'intermediate_size': 10944,
  'moe_intermediate_size': 1408,
  'n_group': 1,
  'n_routed_experts': 64,
  'n_shared_experts': 2,
  'norm_topk_prob': False,
  'num_attention_heads': 16,
  'num_experts_per_tok': 6,
  'num_hidden_layers': 27,
  'q_lora_rank': None,
  'rope_scaling': {**YARN, 'mscale': 0.707, 'mscale_all_dim': 0.707},
  'routed_scaling_factor': 1.0,
  'scoring_func': 'softmax',
  'topk_group': 1,
  'topk_method': 'greedy',
  'vocab_size': 102400,
}
V2 = {
  **V2_LITE,
  'hidden_size': 5120,
  'intermediate_size': 12288,
  'moe_intermediate_size': 1536,
  'n_group': 8,
  'n_routed_experts': 160,
  'num_attention_heads': 128,
  'num_hidden_layers': 60,
  'q_lora_rank': 1536,
  'routed_scaling_factor': 16.0,
  'topk_group': 3,
  'topk_method': 'group_limited_greedy',
}
V3 = {
  **LATENT,
  'model_type': 'deepseek_v3',
  'first_k_dense_replace': 3,
  'hidden_size': 7168,
  'intermediate_size': 18432,
  'moe_intermediate_size': 2048,
  'n_group': 8,
  'n_routed_experts': 256,
  'n_shared_experts': 1,
  'norm_topk_prob': True,
  'num_attention_heads': 128,
  'num_experts_per_tok': 8,
  'num_hidden_layers': 61,
  'num_nextn_predict_layers': 1,
  'q_lora_rank': 1536,
  'rope_scaling': {**YARN, 'mscale': 1.0, 'mscale_all_dim': 1.0},
  'routed_scaling_factor': 2.5,
  'scoring_func': 'sigmoid',
  'topk_group': 4,
  'topk_method': 'noaux_tc',
  'vocab_size': 129280,
}
V3_2 = {
  **V3,
  'model_type': 'deepseek_v32',
  'index_n_heads': 64,
  'index_head_dim': 128,
  'index_topk': 2048,
}
KIMI_K2 = {
  **V3,
  'model_type': 'kimi_k2',
  'first_k_dense_replace': 1,
  'n_group': 1,
  'n_routed_experts': 384,
  'num_attention_heads': 64,
  'num_nextn_predict_layers': 0,
  'rope_theta': 50000.0,
  'rope_scaling': {**YARN, 'factor': 32.0, 'mscale': 1.0, 'mscale_all_dim': 1.0},
  'routed_scaling_factor': 2.827,
  'topk_group': 1,
  'vocab_size': 163840,
}
V4_FLASH = {
  'model_type': 'deepseek_v4',
  'compress_ratios': [0, 0, *(4, 128) * 20, 4, 0],
  'compress_rope_theta': 160000,
  'hc_eps': 1e-06,
  'hc_mult': 4,
  'hc_sinkhorn_iters': 20,
  'head_dim': 512,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'index_head_dim': 128,
  'index_n_heads': 64,
  'index_topk': 512,
  'moe_intermediate_size': 2048,
  'n_routed_experts': 256,
  'n_shared_experts': 1,
  'norm_topk_prob': True,
  'num_attention_heads': 64,
  'num_experts_per_tok': 6,
  'num_hash_layers': 3,
  'num_hidden_layers': 43,
  'num_key_value_heads': 1,
  'num_nextn_predict_layers': 1,
  'o_groups': 8,
  'o_lora_rank': 1024,
  'q_lora_rank': 1024,
  'qk_rope_head_dim': 64,
  'rms_norm_eps': 1e-06,
  'rope_scaling': {**YARN, 'factor': 16, 'original_max_position_embeddings': 65536},
  'rope_theta': 10000,
  'routed_scaling_factor': 1.5,
  'scoring_func': 'sqrtsoftplus',
  'sliding_window': 128,
  'swiglu_limit': 10.0,
  'vocab_size': 129280,
}
V4_PRO = {
  **V4_FLASH,
  'compress_ratios': [128, 128, *(4, 128) * 29, 4, 0],
  'hidden_size': 7168,
  'index_topk': 1024,
  'moe_intermediate_size': 3072,
  'n_routed_experts': 384,
  'num_attention_heads': 128,
  'num_hidden_layers': 61,
  'o_groups': 16,
  'q_lora_rank': 1536,
  'routed_scaling_factor': 2.5,
}
PUBLISHED = {
  'v2_lite': V2_LITE,
  'v2_236b': V2,
  'v3_671b': V3,
  'v3_2_671b': V3_2,
  'kimi_k2': KIMI_K2,
  'v4_flash': V4_FLASH,
  'v4_pro': V4_PRO,
}


def computes(model):
  """A model without what only its training knows: losses, and where experts are."""
  plain = {'balance': None, 'dispatch': Local()}
  changes = {'feed_forward': dataclasses.replace(model.feed_forward, **plain)}
  if isinstance(model, DeepSeekV4):
    changes['hashed'] = dataclasses.replace(model.hashed, **plain)
  return dataclasses.replace(model, **changes)


@pytest.mark.parametrize('name', PUBLISHED)
def test_published(name):
  assert model_of(PUBLISHED[name]) == computes(load_config(name).model)


def test_as_transformers_writes_it():
  """Rotary parameters under one name, kinds of layers by name."""
  given = {k: v for k, v in V3.items() if k not in ('rope_theta', 'rope_scaling')}
  rope = {'rope_type': 'yarn', 'rope_theta': 10000.0, **V3['rope_scaling']}
  assert model_of({**given, 'rope_parameters': rope}) == model_of(V3)
  kinds = ('sliding_attention', 'compressed_sparse_attention', 'heavily_compressed_attention')
  window, sparse, heavy = kinds
  skipped = ('compress_ratios', 'num_hash_layers', 'qk_rope_head_dim', 'rope_scaling', 'rope_theta')
  given = {k: v for k, v in V4_FLASH.items() if k not in skipped}
  yarn = {'rope_type': 'yarn', 'rope_theta': 160000.0, 'attention_factor': 1.0}
  yarn |= {k: v for k, v in V4_FLASH['rope_scaling'].items() if k != 'type'}
  written = {
    'layer_types': [window, window, *(sparse, heavy) * 20, sparse],
    'mlp_layer_types': ['hash_moe'] * 3 + ['moe'] * 40,
    'compress_rates': {sparse: 4, heavy: 128},
    'partial_rotary_factor': 0.125,
    'rope_parameters': {
      'main': {'rope_type': 'default', 'rope_theta': 10000.0},
      'compress': yarn,
    },
  }
  assert model_of({**given, **written}) == model_of(V4_FLASH)


def test_kinds_of_layers_go_before_their_number():
  """As in transformers: the number may be what it begins with, where kinds were given."""
  kinds = ['dense'] + ['sparse'] * 60
  assert model_of({**V3_2, 'mlp_layer_types': kinds}).dense_layers == 1
  assert model_of({**V3_2, 'mlp_layer_types': None}).dense_layers == 3


def test_without_prediction_of_more_tokens():
  assert model_of({**V3, 'num_nextn_predict_layers': 0}).mtp is None
  assert model_of({**V4_FLASH, 'num_nextn_predict_layers': None}).mtp is None


@pytest.mark.parametrize(
  ('config', 'messages'),
  [
    ({'model_type': 'deepseek_v5'}, ["`model_type` is 'deepseek_v5'; did you mean"]),
    ({}, ['`model_type` is None', 'expected one of deepseek_v2, deepseek_v3']),
    (
      {**V3, 'kv_lora_rank': None, 'hidden_act': 'gelu', 'tie_word_embeddings': True},
      [
        '`kv_lora_rank` is missing',
        "`hidden_act` is 'gelu'; expected 'silu'",
        '`tie_word_embeddings` is True; expected False',
      ],
    ),
    ({**V2, 'norm_topk_prob': True}, ['`norm_topk_prob` is True; expected False']),
    ({**V3, 'scoring_func': 'softmax'}, ["`scoring_func` is 'softmax'; expected 'sigmoid'"]),
    ({**V3, 'num_experts_per_tok': 300}, ['`top_k` is 300, more than the 256 `experts`']),
    ({**V3, 'rope_interleave': False}, ['`rope_interleave` is False; expected True']),
    ({**V3_2, 'mlp_layer_types': ['sparse'] * 60 + ['dense']}, ['`dense` first, then `sparse`']),
    ({**V3_2, 'mlp_layer_types': ['sparse'] * 3}, ['expected 61, `dense` first']),
    (
      {**V3, 'rope_scaling': {'type': 'linear', 'factor': 2}},
      ["of type 'linear'; expected default or yarn"],
    ),
    ({**V3, 'rope_scaling': {'type': 'yarn'}}, ['`original_max_position_embeddings` is missing']),
    ({**V4_FLASH, 'compress_ratios': [0] * 3}, ['`layer_types`', 'expected 43']),
    ({**V4_FLASH, 'compress_ratios': [0, 128, *(4, 128) * 21]}, ['one kind']),
    ({**V4_FLASH, 'mlp_layer_types': ['moe', 'hash_moe'] + ['moe'] * 41}, ['`hash_moe` first']),
  ],
)
def test_what_no_model_does(config, messages):
  with pytest.raises(ConfigError) as caught:
    model_of(config)
  for message in messages:
    assert message in str(caught.value)
