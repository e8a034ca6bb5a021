"""The published `config.json` that describes a model: the inverse of `model_of`."""

import dataclasses
from typing import Any

from deepseek_jax.convert.architecture import HEAVY, SPARSE, WINDOW, model_of
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.difference import difference
from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.attention.sparse import DSA, Sparse
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.hyper_connections import HyperConnections
from deepseek_jax.layers.moe.dispatch.local import Local
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.hash import Hash, Random
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.layers.moe.router.softmax import Softmax
from deepseek_jax.layers.moe.router.sqrt_softplus import SqrtSoftplus
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.deepseek_v4 import DeepSeekV4

ARCHITECTURES = {
  'deepseek_v2': 'DeepseekV2ForCausalLM',
  'deepseek_v3': 'DeepseekV3ForCausalLM',
  'deepseek_v32': 'DeepseekV32ForCausalLM',
  'deepseek_v4': 'DeepseekV4ForCausalLM',
}


def config_of(model: DeepSeekV3 | DeepSeekV4, length: int) -> dict[str, Any]:
  """Returns the config under which other programs know a model.

  Args:
    model: its losses, its dispatch and what else only training knows are left out.
    length: tokens of the longest row it was trained on; with YaRN it is that times the factor.

  Raises:
    ConfigError: the model has parts that no published config can describe, all of them listed.
  """
  plain = trained(model)
  try:
    given = _v4(plain) if isinstance(plain, DeepSeekV4) else _latent(plain)
    found = model_of(given)
  except (AttributeError, ConfigError) as error:
    raise ConfigError(f'no published config describes this model: {error}') from error
  if found != plain:
    raise ConfigError(
      [
        f'model.{change.path} is {change.new!r}; a published config can only say {change.old!r}'
        for change in difference(found, plain)
      ]
    )
  yarn = _rope_of(plain).yarn
  positions = length if yarn is None else int(yarn.original_length * yarn.factor)
  return {
    'architectures': [ARCHITECTURES[given['model_type']]],
    **given,
    'max_position_embeddings': positions,
    'hidden_act': 'silu',
    'attention_bias': False,
    'attention_dropout': 0.0,
    'tie_word_embeddings': False,
  }


def trained(model: DeepSeekV3 | DeepSeekV4) -> DeepSeekV3 | DeepSeekV4:
  """Returns what a model computes once it is trained: nothing of how it was trained is left."""
  changes: dict[str, Any] = {'feed_forward': _mixture(model.feed_forward)}
  if isinstance(model, DeepSeekV4):
    changes['sparse'] = dataclasses.replace(model.sparse, index_loss=CSA.index_loss)
    changes['hashed'] = None if model.hashed is None else _mixture(model.hashed)
    # Both say how the lanes begin.
    if isinstance(model.residual, HyperConnections):
      fresh = HyperConnections()
      changes['residual'] = dataclasses.replace(model.residual, gate=fresh.gate, keep=fresh.keep)
  elif isinstance(model.attention, DSA):
    changes['attention'] = dataclasses.replace(model.attention, stage=Sparse())
  return dataclasses.replace(model, **changes)


def _mixture(f: MoE | SwiGLU) -> MoE | SwiGLU:
  if isinstance(f, SwiGLU):
    return f
  router = f.router
  if isinstance(router, Hash):
    router = dataclasses.replace(router, table=Random())
  elif isinstance(router, Softmax | Sigmoid | SqrtSoftplus):
    router = dataclasses.replace(router, noise=None)
  return dataclasses.replace(
    f, router=router, balance=None, z_loss=None, dispatch=Local(), growth=None, breaker=None
  )


def _rope_of(model: DeepSeekV3 | DeepSeekV4) -> RoPE:
  kind = model.sparse if isinstance(model, DeepSeekV4) else model.attention
  assert isinstance(kind, CSA | MLA | DSA)
  return kind.rope


def _latent(model: DeepSeekV3) -> dict[str, Any]:
  """V2, V3 and V3.2."""
  a, f = model.attention, model.feed_forward
  if not isinstance(a, MLA | DSA):
    raise ConfigError(f'attention is {type(a).__name__}; expected MLA or DSA')
  if not isinstance(f, MoE):
    raise ConfigError(f'feed_forward is {type(f).__name__}; expected MoE')
  kind = 'deepseek_v32' if isinstance(a, DSA) else 'deepseek_v3'
  if isinstance(f.router, Softmax):
    kind = 'deepseek_v2'
    greedy = f.router.groups == 1
    routing = {
      'topk_method': 'greedy' if greedy else 'group_limited_greedy',
      'scoring_func': 'softmax',
      'norm_topk_prob': False,
    }
  elif isinstance(f.router, Sigmoid):
    routing = {'topk_method': 'noaux_tc', 'scoring_func': 'sigmoid', 'norm_topk_prob': True}
  else:
    raise ConfigError(f'router is {type(f.router).__name__}; expected Softmax or Sigmoid')
  config = {
    'model_type': kind,
    'num_hidden_layers': model.depth,
    'hidden_size': model.width,
    'vocab_size': model.vocab,
    'intermediate_size': model.dense.hidden,
    'first_k_dense_replace': model.dense_layers,
    'moe_layer_freq': 1,
    'num_attention_heads': a.heads,
    'num_key_value_heads': a.heads,
    'qk_nope_head_dim': a.nope_dim,
    'qk_rope_head_dim': a.rope_dim,
    'v_head_dim': a.value_dim,
    'kv_lora_rank': a.latent,
    'q_lora_rank': a.query_latent,
    'n_group': f.router.groups,
    'topk_group': f.router.kept_groups,
    **routing,
    **_experts(f, f.router.scale),
    **_rotary(a.rope),
    'rms_norm_eps': model.norm.epsilon,
    'num_nextn_predict_layers': 0 if model.mtp is None else model.mtp.depth,
  }
  if isinstance(a, DSA):
    config |= {
      'index_n_heads': a.indexer.heads,
      'index_head_dim': a.indexer.dim,
      'index_topk': a.top_k,
    }
  return config


def _v4(model: DeepSeekV4) -> dict[str, Any]:
  a, f = model.sparse, model.feed_forward
  if not isinstance(f, MoE) or not isinstance(f.router, SqrtSoftplus):
    raise ConfigError('feed_forward: expected MoE with the router SqrtSoftplus')
  if not isinstance(model.residual, HyperConnections):
    raise ConfigError(f'residual is {type(model.residual).__name__}; expected HyperConnections')
  kinds = {SharedWindow: WINDOW, CSA: SPARSE, HCA: HEAVY}
  layers = model.layers()
  hashed = [
    isinstance(block.feed_forward, MoE) and isinstance(block.feed_forward.router, Hash)
    for block in layers
  ]
  plain = model.mtp.attention.rope if model.mtp else RoPE()
  if isinstance(model.first, SharedWindow):
    plain = model.first.rope
  share = a.rope_dim / a.head_dim
  return {
    'model_type': 'deepseek_v4',
    'num_hidden_layers': model.depth,
    'hidden_size': model.width,
    'vocab_size': model.vocab,
    'layer_types': [kinds[type(block.attention)] for block in layers],
    'mlp_layer_types': ['hash_moe' if own else 'moe' for own in hashed],
    'compress_rates': {SPARSE: a.ratio, HEAVY: model.heavy.ratio},
    'num_attention_heads': a.heads,
    'num_key_value_heads': 1,
    'head_dim': a.head_dim,
    'partial_rotary_factor': share,
    'qk_rope_head_dim': a.rope_dim,
    'q_lora_rank': a.query_latent,
    'o_groups': a.groups,
    'o_lora_rank': a.group_dim,
    'sliding_window': a.window,
    'index_n_heads': a.index_heads,
    'index_head_dim': a.index_dim,
    'index_topk': a.top_k,
    'scoring_func': 'sqrtsoftplus',
    'norm_topk_prob': True,
    'swiglu_limit': f.limit,
    **_experts(f, f.router.scale),
    'hc_mult': model.residual.lanes,
    'hc_sinkhorn_iters': model.residual.iterations,
    'hc_eps': model.residual.epsilon,
    'rope_theta': plain.theta,
    'compress_rope_theta': a.rope.theta,
    'rope_parameters': {
      'main': {**_rotary(plain)['rope_parameters'], 'partial_rotary_factor': share},
      'compress': {**_compressed(a.rope), 'partial_rotary_factor': share},
    },
    'rms_norm_eps': model.norm.epsilon,
    'num_nextn_predict_layers': 0 if model.mtp is None else model.mtp.depth,
  }


def _compressed(rope: RoPE) -> dict[str, Any]:
  """There is no magnitude in V4: programs would derive one where they are not told."""
  given = _rotary(rope)['rope_parameters']
  if rope.yarn is None:
    return given
  return {**{k: v for k, v in given.items() if k[:6] != 'mscale'}, 'attention_factor': 1.0}


def _experts(f: MoE, scale: float) -> dict[str, Any]:
  if f.shared is None:
    raise ConfigError('feed_forward has no shared experts; published models have some')
  return {
    'n_routed_experts': f.experts,
    'num_experts_per_tok': f.top_k,
    'moe_intermediate_size': f.hidden,
    'n_shared_experts': f.shared,
    'routed_scaling_factor': scale,
  }


def _rotary(rope: RoPE) -> dict[str, Any]:
  """Under the name of the hub's files too, for programs that know no other."""
  if rope.yarn is None:
    plain = {'rope_type': 'default', 'rope_theta': rope.theta}
    return {'rope_theta': rope.theta, 'rope_parameters': plain}
  yarn = {
    'factor': rope.yarn.factor,
    'original_max_position_embeddings': rope.yarn.original_length,
    'beta_fast': rope.yarn.beta_fast,
    'beta_slow': rope.yarn.beta_slow,
    'mscale': rope.yarn.mscale,
    'mscale_all_dim': rope.yarn.mscale_all,
  }
  return {
    'rope_theta': rope.theta,
    'rope_parameters': {'rope_type': 'yarn', 'rope_theta': rope.theta, **yarn},
  }
