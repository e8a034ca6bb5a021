"""What every weight of a model is called in published checkpoints, and how it lies there."""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from deepseek_jax.convert.forms import (
  Experts,
  Form,
  FromGroups,
  FromHeads,
  Same,
  ToHeads,
  Turned,
)
from deepseek_jax.convert.vision import vision_entries
from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.attention.sparse import DSA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.hash import Hash
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.layers.moe.router.softmax import Softmax
from deepseek_jax.layers.moe.router.sqrt_softplus import SqrtSoftplus
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.deepseek_v4 import DeepSeekV4
from deepseek_jax.models.multimodal import Multimodal
from deepseek_jax.models.plan import Block


class Entry(NamedTuple):
  """One array of ours.

  Attributes:
    ours: its canonical address, such as `params/layers/3/attention/output`.
    theirs: the tensors that it is made of.
    form: how.
  """

  ours: str
  theirs: tuple[str, ...]
  form: Form = Same()


class Names(NamedTuple):
  """All of a model.

  Attributes:
    entries: one for each array.
    copies: tensors that checkpoints hold twice, and what they are copies of.
  """

  entries: list[Entry]
  copies: dict[str, str]


def names_of(model: DeepSeekV3 | DeepSeekV4 | Multimodal) -> Names:
  """Returns the names on the hub.

  Raises:
    ConfigError: the model has parts that no released model has.
  """
  if isinstance(model, Multimodal):
    return Names([Entry(*named) for named in vision_entries(model)], {})
  if isinstance(model, DeepSeekV4):
    return _v4(model)
  return _v3(model)


def _v3(model: DeepSeekV3) -> Names:
  """V2, V3, V3.2 and others of their shape."""
  entries = [
    Entry('params/embedding/weight', ('model.embed_tokens.weight',)),
    Entry('params/norm/scale', ('model.norm.weight',)),
    Entry('params/head/weight', ('lm_head.weight',), Turned()),
  ]
  layers, copies = model.layers(), {}
  for number, block in enumerate(layers):
    entries += _v3_block(f'layers/{number}', f'model.layers.{number}', block)
  for depth in range(0 if model.mtp is None else model.mtp.depth):
    ours, theirs = f'params/mtp_{depth}', f'model.layers.{model.depth + depth}'
    entries += _v3_block(f'mtp_{depth}/block', theirs, layers[-1])
    entries += [
      Entry(f'{ours}/join', (f'{theirs}.eh_proj.weight',), Turned()),
      Entry(f'{ours}/embedding_norm/scale', (f'{theirs}.enorm.weight',)),
      Entry(f'{ours}/hidden_norm/scale', (f'{theirs}.hnorm.weight',)),
      Entry(f'{ours}/norm/scale', (f'{theirs}.shared_head.norm.weight',)),
    ]
    copies[f'{theirs}.embed_tokens.weight'] = 'model.embed_tokens.weight'
    copies[f'{theirs}.shared_head.head.weight'] = 'lm_head.weight'
  return Names(entries, copies)


def _v3_block(ours: str, theirs: str, block: Block) -> Iterator[Entry]:
  yield Entry(f'params/{ours}/attention_norm/scale', (f'{theirs}.input_layernorm.weight',))
  after = f'{theirs}.post_attention_layernorm.weight'
  yield Entry(f'params/{ours}/feed_forward_norm/scale', (after,))
  yield from _latent(f'params/{ours}/attention', f'{theirs}.self_attn', block.attention)
  parts = {'gate': 'gate_proj', 'up': 'up_proj', 'down': 'down_proj'}
  bias = 'gate.e_score_correction_bias'
  yield from _feed_forward(f'{ours}/feed_forward', f'{theirs}.mlp', block, parts, bias)


def _latent(ours: str, theirs: str, a: object) -> Iterator[Entry]:
  if type(a) not in (MLA, DSA):
    raise ConfigError(f'attention {type(a).__name__}: no released model has it')
  assert isinstance(a, MLA | DSA)
  yield Entry(f'{ours}/latent_down', (f'{theirs}.kv_a_proj_with_mqa.weight',), Turned())
  yield Entry(f'{ours}/latent_norm/scale', (f'{theirs}.kv_a_layernorm.weight',))
  yield Entry(f'{ours}/key_value_up', (f'{theirs}.kv_b_proj.weight',), ToHeads(a.heads))
  yield Entry(f'{ours}/output', (f'{theirs}.o_proj.weight',), FromHeads(a.heads))
  if a.query_latent is None:
    yield Entry(f'{ours}/query', (f'{theirs}.q_proj.weight',), ToHeads(a.heads))
  else:
    yield Entry(f'{ours}/query_down', (f'{theirs}.q_a_proj.weight',), Turned())
    yield Entry(f'{ours}/query_norm/scale', (f'{theirs}.q_a_layernorm.weight',))
    yield Entry(f'{ours}/query_up', (f'{theirs}.q_b_proj.weight',), ToHeads(a.heads))
  if isinstance(a, DSA):
    ours, theirs = f'{ours}/indexer', f'{theirs}.indexer'
    yield Entry(f'{ours}/query', (f'{theirs}.wq_b.weight',), Turned())
    yield Entry(f'{ours}/key', (f'{theirs}.wk.weight',), Turned())
    yield Entry(f'{ours}/key_scale', (f'{theirs}.k_norm.weight',))
    yield Entry(f'{ours}/key_bias', (f'{theirs}.k_norm.bias',))
    yield Entry(f'{ours}/weights', (f'{theirs}.weights_proj.weight',), Turned())


def _feed_forward(
  ours: str, theirs: str, block: Block, parts: dict[str, str], bias: str
) -> Iterator[Entry]:
  f = block.feed_forward
  if isinstance(f, SwiGLU):
    for part, name in parts.items():
      yield Entry(f'params/{ours}/{part}', (f'{theirs}.{name}.weight',), Turned())
    return
  assert isinstance(f, MoE)
  yield Entry(f'params/{ours}/router/weight', (f'{theirs}.gate.weight',), Turned())
  if isinstance(f.router, Hash):
    yield Entry(f'buffers/{ours}/router/table', (f'{theirs}.gate.tid2eid',))
  elif isinstance(f.router, Sigmoid | SqrtSoftplus):
    yield Entry(f'buffers/{ours}/router/selection_bias', (f'{theirs}.{bias}',))
  elif not isinstance(f.router, Softmax):
    raise ConfigError(f'router {type(f.router).__name__}: no released model has it')
  for part, name in parts.items():
    each = tuple(f'{theirs}.experts.{e}.{name}.weight' for e in range(f.experts))
    yield Entry(f'params/{ours}/{part}', each, Experts())
    if f.shared is not None:
      shared = (f'{theirs}.shared_experts.{name}.weight',)
      yield Entry(f'params/{ours}/shared/{part}', shared, Turned())


def _v4(model: DeepSeekV4) -> Names:
  entries = [
    Entry('params/embedding/weight', ('embed.weight',)),
    Entry('params/norm/scale', ('norm.weight',)),
    Entry('params/head/weight', ('head.weight',), Turned()),
    *_lanes('params/close/head', 'hc_head'),
  ]
  layers = model.layers()
  for number, block in enumerate(layers):
    entries += _v4_block(f'layers/{number}', f'layers.{number}', block)
  for depth in range(0 if model.mtp is None else model.mtp.depth):
    assert model.mtp is not None
    ours, theirs = f'params/mtp_{depth}', f'mtp.{depth}'
    entries += _v4_block(f'mtp_{depth}/block', theirs, model.mtp.block(layers[-1]))
    entries += [
      Entry(f'{ours}/embedding_join', (f'{theirs}.e_proj.weight',), Turned()),
      Entry(f'{ours}/hidden_join', (f'{theirs}.h_proj.weight',), Turned()),
      Entry(f'{ours}/embedding_norm/scale', (f'{theirs}.enorm.weight',)),
      Entry(f'{ours}/hidden_norm/scale', (f'{theirs}.hnorm.weight',)),
      Entry(f'{ours}/norm/scale', (f'{theirs}.norm.weight',)),
      *_lanes(f'{ours}/close/head', f'{theirs}.hc_head'),
    ]
  return Names(entries, {})


def _v4_block(ours: str, theirs: str, block: Block) -> Iterator[Entry]:
  for our_site, their_site in (('attention', 'attn'), ('feed_forward', 'ffn')):
    yield Entry(f'params/{ours}/{our_site}_norm/scale', (f'{theirs}.{their_site}_norm.weight',))
    yield from _lanes(f'params/{ours}/{our_site}_residual/mixer', f'{theirs}.hc_{their_site}')
  yield from _shared_key(f'params/{ours}/attention', f'{theirs}.attn', block.attention)
  parts = {'gate': 'w1', 'up': 'w3', 'down': 'w2'}
  yield from _feed_forward(f'{ours}/feed_forward', f'{theirs}.ffn', block, parts, 'gate.bias')


def _lanes(ours: str, theirs: str) -> Iterator[Entry]:
  yield Entry(f'{ours}/matrix', (f'{theirs}_fn',), Turned())
  yield Entry(f'{ours}/base', (f'{theirs}_base',))
  yield Entry(f'{ours}/gates', (f'{theirs}_scale',))


def _shared_key(ours: str, theirs: str, a: object) -> Iterator[Entry]:
  if not isinstance(a, SharedWindow | HCA | CSA):
    raise ConfigError(f'attention {type(a).__name__}: no released V4 has it')
  yield Entry(f'{ours}/query_down', (f'{theirs}.wq_a.weight',), Turned())
  yield Entry(f'{ours}/query_norm/scale', (f'{theirs}.q_norm.weight',))
  yield Entry(f'{ours}/query_up', (f'{theirs}.wq_b.weight',), ToHeads(a.heads))
  yield Entry(f'{ours}/key', (f'{theirs}.wkv.weight',), Turned())
  yield Entry(f'{ours}/key_norm/scale', (f'{theirs}.kv_norm.weight',))
  yield Entry(f'{ours}/sinks', (f'{theirs}.attn_sink',))
  down = FromGroups(a.heads, a.groups)
  yield Entry(f'{ours}/output_down', (f'{theirs}.wo_a.weight',), down)
  yield Entry(f'{ours}/output_up', (f'{theirs}.wo_b.weight',), Turned())
  if isinstance(a, HCA | CSA):
    yield from _compressor(f'{ours}/compressor', f'{theirs}.compressor')
  if isinstance(a, CSA):
    yield from _compressor(f'{ours}/index_compressor', f'{theirs}.indexer.compressor')
    query = (f'{theirs}.indexer.wq_b.weight',)
    yield Entry(f'{ours}/index_query', query, ToHeads(a.index_heads))
    yield Entry(f'{ours}/index_weights', (f'{theirs}.indexer.weights_proj.weight',), Turned())


def _compressor(ours: str, theirs: str) -> Iterator[Entry]:
  yield Entry(f'{ours}/value', (f'{theirs}.wkv.weight',), Turned())
  yield Entry(f'{ours}/gate', (f'{theirs}.wgate.weight',), Turned())
  yield Entry(f'{ours}/position_bias', (f'{theirs}.ape',))
  yield Entry(f'{ours}/norm/scale', (f'{theirs}.norm.weight',))


RENAMED = (
  (r'^(?!head|hc_head)', 'model.'),
  (r'^model\.embed\.', 'model.embed_tokens.'),
  (r'^head\.', 'lm_head.'),
  (r'^hc_head_', 'model.hc_head.hc_'),
  (r'\.attn\.indexer\.compressor\.', '.attn.compressor.indexer.'),
  (r'\.attn\.indexer\.weights_proj\.', '.attn.compressor.indexer.scorer.weights_proj.'),
  (r'\.attn\.indexer\.wq_b\.', '.attn.compressor.indexer.q_b_proj.'),
  (r'\.hc_(attn|ffn)_', r'.\1_hc.'),
  (r'\.attn_norm\.', '.input_layernorm.'),
  (r'\.ffn_norm\.', '.post_attention_layernorm.'),
  (r'\.attn_sink$', '.sinks'),
  (r'(compressor.*)\.norm\.', r'\1.kv_norm.'),
  (r'\.ape$', '.position_bias'),
  (r'\.wq_a\.', '.q_a_proj.'),
  (r'\.wq_b\.', '.q_b_proj.'),
  (r'\.wkv\.', '.kv_proj.'),
  (r'\.wgate\.', '.gate_proj.'),
  (r'\.wo_([ab])\.', r'.o_\1_proj.'),
  (r'\.q_norm\.', '.q_a_norm.'),
  (r'\.gate\.bias$', '.gate.e_score_correction_bias'),
  (r'\.w1\.', '.gate_proj.'),
  (r'\.w2\.', '.down_proj.'),
  (r'\.w3\.', '.up_proj.'),
  (r'\.attn\.', '.self_attn.'),
  (r'\.ffn\.', '.mlp.'),
)
"""From the hub's names of V4 to those of transformers, one after the other."""


def spellings(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
  """Yields the entries under every set of names that files are known to have, the hub's first."""
  yield list(entries)
  yield as_transformers_saves(entries)
  yield as_in_transformers(entries)


def as_in_transformers(entries: Sequence[Entry]) -> list[Entry]:
  """Returns the entries of a V4 under the names that transformers gives them."""
  return [entry._replace(theirs=tuple(map(_rename, entry.theirs))) for entry in entries]


def _rename(name: str) -> str:
  for pattern, new in RENAMED:
    name = re.sub(pattern, new, name)
  return name


SAVED = (
  (r'^(layers|norm)\.', r'model.\1.'),
  (r'^embed\.', 'model.embed_tokens.'),
  (r'^hc_head_', 'model.hc_head.hc_'),
  (r'\.attn\.kv_norm\.', '.attn.norm.'),
)
"""From the hub's names of V4 to those in files that transformers 5 writes: it turns most of its own
names back when it saves, and a few of them not, or not into the same."""


def as_transformers_saves(entries: Sequence[Entry]) -> list[Entry]:
  """Returns the entries under the names that `save_pretrained` gives them.

  Those of V4 lie between the hub's and `as_in_transformers`; all others are the hub's.
  """
  saved = []
  for entry in entries:
    theirs = entry.theirs
    for pattern, new in SAVED:
      theirs = tuple(re.sub(pattern, new, name) for name in theirs)
    saved.append(entry._replace(theirs=theirs))
  return saved
