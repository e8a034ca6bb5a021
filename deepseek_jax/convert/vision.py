"""DeepSeek-VL on the hub: which model its config describes, and what its weights are called."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deepseek_jax.convert.forms import Form, FromHeads, Same, ToHeads, Turned, only
from deepseek_jax.convert.lazy import Lazy, flattened, stacked, transposed, unflattened
from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.bidirectional import Bidirectional
from deepseek_jax.layers.attention.mha import MHA
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.bias import Bias
from deepseek_jax.layers.encoders.patch import ChannelMajor, Patch2D
from deepseek_jax.layers.encoders.projection import SeparateProjection
from deepseek_jax.layers.feed_forward import MLP, SwiGLU, TanhGELU
from deepseek_jax.layers.norm import LayerNorm, RMSNorm
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.encoder import encoder_segments
from deepseek_jax.models.multimodal import Multimodal

Named = tuple[str, tuple[str, ...], Form]
"""Our address, the published tensors that it is made of, and how."""


@dataclasses.dataclass(frozen=True)
class Paired:
  """[in, H, C] for [H · C, in], where pairs that are rotated are (2k, 2k + 1) for (k, k + C / 2).

  Attributes:
    heads: H.
  """

  heads: int

  def ours(self, parts: Sequence[Lazy]) -> Lazy:
    """Returns [in, H, C]."""
    halves = unflattened(unflattened(transposed(parts[0]), 1, self.heads), 2, 2)
    return flattened(transposed(halves, (0, 1, 3, 2)), 2)

  def theirs(self, x: Lazy) -> list[Lazy]:
    """Returns [H · C, in]."""
    pairs = unflattened(x, 2, x.shape[2] // 2)
    halves = flattened(transposed(pairs, (0, 1, 3, 2)), 2)
    return [transposed(flattened(halves, 1))]


@dataclasses.dataclass(frozen=True)
class Split:
  """[H, C] for [H · C].

  Attributes:
    heads: H.
  """

  heads: int

  def ours(self, parts: Sequence[Lazy]) -> Lazy:
    """Returns [H, C]."""
    return unflattened(parts[0], 0, self.heads)

  def theirs(self, x: Lazy) -> list[Lazy]:
    """Returns [H · C]."""
    return [flattened(x, 0)]


@dataclasses.dataclass(frozen=True)
class Kernel:
  """[P · P · 3, W] for the kernel [W, 3, P, P] of a convolution.

  Attributes:
    size: P.
  """

  size: int

  def ours(self, parts: Sequence[Lazy]) -> Lazy:
    """Returns [P · P · 3, W]."""
    return flattened(flattened(transposed(parts[0], (2, 3, 1, 0)), 0), 0)

  def theirs(self, x: Lazy) -> list[Lazy]:
    """Returns [W, 3, P, P]."""
    square = unflattened(unflattened(x, 0, self.size), 1, self.size)
    return [transposed(square, (3, 2, 0, 1))]


@dataclasses.dataclass(frozen=True)
class EachLayer:
  """[L, …] for L tensors.

  Attributes:
    form: of each.
  """

  form: Form

  def ours(self, parts: Sequence[Lazy]) -> Lazy:
    """Returns [L, …]."""
    return stacked([self.form.ours([part]) for part in parts])

  def theirs(self, x: Lazy) -> list[Lazy]:
    """Returns L tensors."""
    return [self.form.theirs(only(x, place))[0] for place in range(x.shape[0])]


def vision_model_of(config: Mapping[str, Any]) -> Multimodal:
  """Returns the model that the config of a `deepseek_vl` describes.

  Args:
    config: `config.json` as a dict, as transformers writes it: what is not given is its default.

  Raises:
    ConfigError: with all that asks for what no model here does.
  """
  text, vision = (dict(config.get(name) or {}) for name in ('text_config', 'vision_config'))
  errors = [
    f'`{part}.{name}` is {given[name]!r}; expected {wanted!r}'
    for part, given, name, wanted in (
      ('text_config', text, 'model_type', 'llama'),
      ('text_config', text, 'hidden_act', 'silu'),
      ('text_config', text, 'attention_bias', False),
      ('text_config', text, 'mlp_bias', False),
      ('text_config', text, 'tie_word_embeddings', False),
      ('vision_config', vision, 'model_type', 'siglip_vision_model'),
      ('vision_config', vision, 'hidden_act', 'gelu_pytorch_tanh'),
      ('vision_config', vision, 'num_channels', 3),
    )
    if given.get(name, wanted) != wanted
  ]
  rope: Any = text.get('rope_parameters') or text.get('rope_scaling') or {}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind != 'default':
    errors.append(f'`text_config.rope_parameters` are of type {kind!r}; expected default')
  if errors:
    raise ConfigError([f'config.json: {message}' for message in errors])
  theta = float(rope.get('rope_theta', text.get('rope_theta', 10_000.0)))
  return Multimodal(
    text=_text(text, theta),
    image=_image(vision),
    projection=SeparateProjection(bias=Bias()),
  )


def _text(given: Mapping[str, Any], theta: float) -> DeepSeekV3:
  heads, width = given.get('num_attention_heads', 32), given.get('hidden_size', 4096)
  depth = given.get('num_hidden_layers', 32)
  dense = SwiGLU(hidden=given.get('intermediate_size', 11_008))
  return DeepSeekV3(
    depth=depth,
    width=width,
    vocab=given.get('vocab_size', 32_000),
    attention=MHA(
      heads=heads,
      kv_heads=given.get('num_key_value_heads') or heads,
      head_dim=given.get('head_dim') or width // heads,
      rope=RoPE(theta=theta),
    ),
    dense=dense,
    dense_layers=depth,
    feed_forward=dense,
    norm=RMSNorm(epsilon=given.get('rms_norm_eps', 1e-6)),
  )


def _image(given: Mapping[str, Any]) -> Patch2D:
  heads, width = given.get('num_attention_heads', 12), given.get('hidden_size', 768)
  return Patch2D(
    size=given.get('image_size', 224),
    patch=given.get('patch_size', 16),
    merge=1,
    width=width,
    depth=given.get('num_hidden_layers', 12),
    attention=Bidirectional(heads=heads, head_dim=width // heads, bias=Bias()),
    feed_forward=MLP(hidden=given.get('intermediate_size', 3072), unit=TanhGELU()),
    norm=LayerNorm(epsilon=given.get('layer_norm_eps', 1e-6)),
    bias=Bias(),
    # Pixels that fill no patch are left out.
    order=ChannelMajor(),
  )


def vision_entries(model: Multimodal) -> Iterator[Named]:
  """Yields every array of a model with its name in transformers.

  Raises:
    ConfigError: the model has parts that no released model has.
  """
  image, attention = model.image, model.text.attention
  if image is None or list(model.encoders) != ['image'] or not isinstance(attention, MHA):
    raise ConfigError(
      'of models of media, DeepSeek-VL alone has names on the hub: `image` and no other encoder, '
      'and `text.attention` MHA'
    )
  yield 'params/embedding/weight', ('model.language_model.embed_tokens.weight',), Same()
  yield 'params/norm/scale', ('model.language_model.norm.weight',), Same()
  yield 'params/head/weight', ('lm_head.weight',), Turned()
  for number in range(model.text.depth):
    yield from _text_layer(number, attention)
  for ours, theirs in (('up', 'linear1'), ('down', 'linear2')):
    place = f'params/image/projection/{ours}'
    yield place, (f'model.aligner.{theirs}.weight',), Turned()
    yield f'{place}_bias', (f'model.aligner.{theirs}.bias',), Same()
  yield from _encoder(image)


def _text_layer(number: int, attention: MHA) -> Iterator[Named]:
  ours, theirs = f'params/layers/{number}', f'model.language_model.layers.{number}'
  yield f'{ours}/attention_norm/scale', (f'{theirs}.input_layernorm.weight',), Same()
  after = f'{theirs}.post_attention_layernorm.weight'
  yield f'{ours}/feed_forward_norm/scale', (after,), Same()
  for our, their, form in (
    ('query', 'q', Paired(attention.heads)),
    ('key', 'k', Paired(attention.groups)),
    ('value', 'v', ToHeads(attention.groups)),
    ('output', 'o', FromHeads(attention.heads)),
  ):
    yield f'{ours}/attention/{our}', (f'{theirs}.self_attn.{their}_proj.weight',), form
  for part in ('gate', 'up', 'down'):
    yield f'{ours}/feed_forward/{part}', (f'{theirs}.mlp.{part}_proj.weight',), Turned()


def _encoder(image: Patch2D) -> Iterator[Named]:
  theirs, heads = 'model.vision_model', image.attention.heads
  stem = f'{theirs}.embeddings'
  yield 'params/image/stem/kernel', (f'{stem}.patch_embedding.weight',), Kernel(image.patch)
  yield 'params/image/stem/bias', (f'{stem}.patch_embedding.bias',), Same()
  yield 'params/image/stem/position', (f'{stem}.position_embedding.weight',), Same()
  for our, their in (('scale', 'weight'), ('offset', 'bias')):
    yield f'params/image/norm/{our}', (f'{theirs}.post_layernorm.{their}',), Same()
  parts: list[tuple[str, str, Form]] = []
  for site, name in (('attention', 'layer_norm1'), ('feed_forward', 'layer_norm2')):
    parts += [
      (f'{site}_norm/scale', f'{name}.weight', Same()),
      (f'{site}_norm/offset', f'{name}.bias', Same()),
    ]
  for our, their in (('query', 'q'), ('key', 'k'), ('value', 'v')):
    parts += [
      (f'attention/{our}', f'self_attn.{their}_proj.weight', ToHeads(heads)),
      (f'attention/{our}_bias', f'self_attn.{their}_proj.bias', Split(heads)),
    ]
  parts += [
    ('attention/output', 'self_attn.out_proj.weight', FromHeads(heads)),
    ('attention/output_bias', 'self_attn.out_proj.bias', Same()),
  ]
  for our, their in (('up', 'fc1'), ('down', 'fc2')):
    parts += [
      (f'feed_forward/{our}', f'mlp.{their}.weight', Turned()),
      (f'feed_forward/{our}_bias', f'mlp.{their}.bias', Same()),
    ]
  (segment,) = encoder_segments(image)
  for our, their, form in parts:
    names = tuple(f'{theirs}.encoder.layers.{i}.{their}' for i in range(image.depth))
    whole = form if segment.repeats == 1 else EachLayer(form)
    yield f'params/image/stack/segment_0/block_0/{our}', names, whole
