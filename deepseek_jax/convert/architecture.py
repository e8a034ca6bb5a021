"""Which model a published `config.json` describes, and the other way round."""

from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.core.config import ConfigError, did_you_mean
from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.indexer import Indexer
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.rope import RoPE, YaRN
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.attention.sparse import DSA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.hyper_connections import HyperConnections
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.hash import Hash
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.layers.moe.router.softmax import Softmax
from deepseek_jax.layers.moe.router.sqrt_softplus import SqrtSoftplus
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.deepseek_v4 import DeepSeekV4
from deepseek_jax.models.mtp import MTP, LaneMTP

WINDOW, SPARSE, HEAVY = (
  'sliding_attention',
  'compressed_sparse_attention',
  'heavily_compressed_attention',
)
RATIOS = {0: WINDOW, 4: SPARSE, 128: HEAVY}


class Fields:
  """The fields of a `config.json`, and what is found wrong with them."""

  def __init__(self, values: Mapping[str, Any]):
    self.values = values
    self.errors: list[str] = []

  def get(self, name: str, default: Any = None) -> Any:
    """Returns a field; `default` where it is not given, or null."""
    value = self.values.get(name)
    return default if value is None else value

  def need(self, name: str) -> Any:
    """Returns a field that has to be there: 1 in its place, and an error, where it is not."""
    if self.values.get(name) is None:
      self.errors.append(f'`{name}` is missing')
      return 1
    return self.values[name]

  def only(self, name: str, *allowed: Any) -> None:
    """Refuses values that would change what the model computes, and are not known here."""
    value = self.values.get(name)
    if value is not None and value not in allowed:
      wanted = ' or '.join(repr(choice) for choice in allowed)
      self.errors.append(f'`{name}` is {value!r}; expected {wanted}')


def model_of(config: Mapping[str, Any]) -> DeepSeekV3 | DeepSeekV4:
  """Returns the model that a published config describes.

  Args:
    config: `config.json` as a dict: that of the hub, or as transformers writes it.

  Raises:
    ConfigError: with all that is missing, or asks for what no model here does.
  """
  kind = config.get('model_type')
  if kind not in MODELS:
    hint = did_you_mean(str(kind), MODELS)
    raise ConfigError(f'`model_type` is {kind!r}{hint}; expected one of {", ".join(MODELS)}')
  fields = Fields(config)
  fields.only('hidden_act', 'silu')
  fields.only('tie_word_embeddings', False)
  for name in ('attention_bias', 'mlp_bias'):
    fields.only(name, False)
  try:
    model = MODELS[kind](fields)
  except ConfigError as error:
    raise ConfigError([*fields.errors, *error.messages]) from error
  if fields.errors:
    raise ConfigError([f'config.json: {message}' for message in fields.errors])
  return model


def _latent_model(fields: Fields, router: Softmax | Sigmoid, indexer: Indexer | None = None):
  """V2, V3 and V3.2."""
  norm = RMSNorm(epsilon=fields.get('rms_norm_eps', 1e-6))
  fields.only('moe_layer_freq', 1)
  sizes = {
    'heads': fields.need('num_attention_heads'),
    'nope_dim': fields.need('qk_nope_head_dim'),
    'rope_dim': fields.need('qk_rope_head_dim'),
    'value_dim': fields.need('v_head_dim'),
    'latent': fields.need('kv_lora_rank'),
    'query_latent': fields.get('q_lora_rank'),
    'rope': _rope(fields, fields.get('rope_theta', 10_000.0), mscale_all=0.0),
    'norm': norm,
  }
  if indexer is None:
    attention: MLA | DSA = MLA(**sizes)
  else:
    attention = DSA(**sizes, indexer=indexer, top_k=fields.need('index_topk'))
  depth = fields.get('num_nextn_predict_layers', 0)
  return DeepSeekV3(
    depth=fields.need('num_hidden_layers'),
    width=fields.need('hidden_size'),
    vocab=fields.need('vocab_size'),
    attention=attention,
    dense=SwiGLU(hidden=fields.need('intermediate_size')),
    dense_layers=_dense_layers(fields),
    feed_forward=_experts(fields, router),
    mtp=MTP(depth=depth) if depth else None,
    norm=norm,
  )


def _dense_layers(fields: Fields) -> int:
  """Returns how many layers come before those with experts.

  Transformers goes by `mlp_layer_types` where it has them (V3.2), whatever the number says.
  """
  kinds = fields.get('mlp_layer_types')
  if kinds is None:
    return fields.get('first_k_dense_replace', 0)
  count, depth = kinds.count('dense'), fields.need('num_hidden_layers')
  if kinds != ['dense'] * count + ['sparse'] * (depth - count):
    fields.errors.append(
      f'`mlp_layer_types` {kinds}: expected {depth}, `dense` first, then `sparse`'
    )
  return count


def _experts(fields: Fields, router: Any, limit: float | None = None) -> MoE:
  return MoE(
    experts=fields.need('n_routed_experts'),
    top_k=fields.need('num_experts_per_tok'),
    hidden=fields.need('moe_intermediate_size'),
    shared=fields.get('n_shared_experts'),
    limit=limit,
    router=router,
    # How it was trained is not in its config.
    balance=None,
  )


def _v2(fields: Fields) -> DeepSeekV3:
  fields.only('topk_method', 'greedy', 'group_limited_greedy')
  fields.only('norm_topk_prob', False)
  fields.only('scoring_func', 'softmax')
  scale = float(fields.get('routed_scaling_factor', 1.0))
  if fields.get('topk_method', 'greedy') == 'greedy':
    return _latent_model(fields, Softmax(scale=scale))
  groups, kept = fields.need('n_group'), fields.need('topk_group')
  return _latent_model(fields, Softmax(groups=groups, kept_groups=kept, scale=scale))


def _sigmoid(fields: Fields) -> Sigmoid:
  fields.only('topk_method', 'noaux_tc')
  fields.only('norm_topk_prob', True)
  fields.only('scoring_func', 'sigmoid')
  fields.only('rope_interleave', True)
  return Sigmoid(
    groups=fields.get('n_group', 1),
    kept_groups=fields.get('topk_group', 1),
    scale=float(fields.get('routed_scaling_factor', 1.0)),
  )


def _v3(fields: Fields) -> DeepSeekV3:
  return _latent_model(fields, _sigmoid(fields))


def _v32(fields: Fields) -> DeepSeekV3:
  indexer = Indexer(heads=fields.need('index_n_heads'), dim=fields.need('index_head_dim'))
  return _latent_model(fields, _sigmoid(fields), indexer)


def _v4(fields: Fields) -> DeepSeekV4:
  fields.only('scoring_func', 'sqrtsoftplus')
  fields.only('norm_topk_prob', True)
  fields.only('num_key_value_heads', 1)
  norm = RMSNorm(epsilon=fields.get('rms_norm_eps', 1e-6))
  depth, head_dim = fields.need('num_hidden_layers'), fields.need('head_dim')
  share = fields.get('partial_rotary_factor', 64 / 512)
  sizes = {
    'heads': fields.need('num_attention_heads'),
    'head_dim': head_dim,
    'rope_dim': fields.get('qk_rope_head_dim', int(head_dim * share)),
    'query_latent': fields.need('q_lora_rank'),
    'groups': fields.need('o_groups'),
    'group_dim': fields.need('o_lora_rank'),
    'window': fields.need('sliding_window'),
    'norm': norm,
  }
  rates = fields.get('compress_rates', {})
  ratios = {
    SPARSE: fields.get('compress_rate_csa', rates.get(SPARSE, 4)),
    HEAVY: fields.get('compress_rate_hca', rates.get(HEAVY, 128)),
  }
  nested = fields.get('rope_parameters', {})
  rope = _rope(fields, fields.get('compress_rope_theta', 160_000.0), nested.get('compress'))
  plain = _rope(fields, fields.get('rope_theta', 10_000.0), nested.get('main', {}))
  window = SharedWindow(**sizes, rope=plain)
  heavy = HCA(**sizes, rope=rope, ratio=ratios[HEAVY])
  sparse = CSA(
    **sizes,
    rope=rope,
    ratio=ratios[SPARSE],
    top_k=fields.need('index_topk'),
    index_heads=fields.need('index_n_heads'),
    index_dim=fields.need('index_head_dim'),
  )
  first, first_layers = _first_layers(fields, depth)
  scale = float(fields.get('routed_scaling_factor', 1.5))
  routed = _experts(fields, SqrtSoftplus(scale=scale), fields.get('swiglu_limit'))
  vocab, hashed = fields.need('vocab_size'), _hashed_layers(fields, depth)
  table = _experts(fields, Hash(vocab=vocab, scale=scale), fields.get('swiglu_limit'))
  ahead = fields.get('num_nextn_predict_layers', 0)
  return DeepSeekV4(
    depth=depth,
    width=fields.need('hidden_size'),
    vocab=vocab,
    first=heavy if first == HEAVY else window,
    sparse=sparse,
    heavy=heavy,
    feed_forward=routed,
    first_layers=first_layers,
    hashed=table if hashed else None,
    hashed_layers=hashed,
    mtp=LaneMTP(depth=ahead, attention=window) if ahead else None,
    residual=HyperConnections(
      lanes=fields.get('hc_mult', 4),
      iterations=fields.get('hc_sinkhorn_iters', 20),
      epsilon=fields.get('hc_eps', 1e-6),
    ),
    norm=norm,
  )


def _first_layers(fields: Fields, depth: int) -> tuple[str, int]:
  """Returns the kind of the layers before those that take turns, and how many these are."""
  kinds = fields.get('layer_types')
  if kinds is None and (given := fields.get('compress_ratios')) is not None:
    kinds = [RATIOS.get(ratio, str(ratio)) for ratio in given]
  if kinds is None:
    kinds = [HEAVY, HEAVY] + [(HEAVY, SPARSE)[place % 2] for place in range(depth - 2)]
  kinds = list(kinds)[:depth]
  count = next((place for place, kind in enumerate(kinds) if kind == SPARSE), len(kinds))
  turns = [(SPARSE, HEAVY)[place % 2] for place in range(len(kinds) - count)]
  same = len(set(kinds[:count])) < 2 and set(kinds[:count]) <= {WINDOW, HEAVY}
  if len(kinds) < depth or kinds[count:] != turns or not same:
    fields.errors.append(
      f'`layer_types` {kinds}: expected {depth}, one kind ({WINDOW} or {HEAVY}) first, then '
      f'{SPARSE} and {HEAVY} by turns'
    )
  return kinds[0] if count else WINDOW, count


def _hashed_layers(fields: Fields, depth: int) -> int:
  kinds = fields.get('mlp_layer_types')
  if kinds is None:
    return min(fields.get('num_hash_layers', 3), depth)
  count = kinds.count('hash_moe')
  if kinds != ['hash_moe'] * count + ['moe'] * (depth - count):
    fields.errors.append(f'`mlp_layer_types` {kinds}: expected `hash_moe` first, then `moe`')
  return count


def _rope(
  fields: Fields,
  theta: float,
  parameters: Mapping[str, Any] | None = None,
  mscale_all: float = 1.0,
) -> RoPE:
  """Reads `rope_parameters`, as transformers writes them, or the hub's `rope_scaling`.

  Args:
    fields: of the config.
    theta: base where the parameters have none.
    parameters: in the place of those of the config.
    mscale_all: `mscale_all_dim` where the parameters have none. As much as `mscale`, there is no
      magnitude at all, as in V4.
  """
  if parameters is None:
    parameters = fields.get('rope_parameters') or fields.get('rope_scaling') or {}
  theta = float(parameters.get('rope_theta', theta))
  kind = parameters.get('rope_type', parameters.get('type', 'default'))
  if kind == 'default':
    return RoPE(theta=theta)
  if kind != 'yarn':
    fields.errors.append(f'`rope_parameters` are of type {kind!r}; expected default or yarn')
    return RoPE(theta=theta)
  if (original := parameters.get('original_max_position_embeddings')) is None:
    fields.errors.append('`rope_parameters`: `original_max_position_embeddings` is missing')
  yarn = YaRN(
    factor=float(parameters.get('factor', 1.0)),
    original_length=original or 1,
    beta_fast=float(parameters.get('beta_fast', 32.0)),
    beta_slow=float(parameters.get('beta_slow', 1.0)),
    mscale=float(parameters.get('mscale', 1.0)),
    mscale_all=float(parameters.get('mscale_all_dim', mscale_all)),
  )
  return RoPE(theta=theta, yarn=yarn)


MODELS: dict[str, Callable[[Fields], DeepSeekV3 | DeepSeekV4]] = {
  'deepseek_v2': _v2,
  'deepseek_v3': _v3,
  'kimi_k2': _v3,
  'deepseek_v32': _v32,
  'deepseek_v4': _v4,
}
