"""Runs a model one layer at a time, so that what is inside can be looked at.

The stack runs equal layers in one scan, out of which nothing comes but its end. Here every layer is
applied alone, with the weights at its canonical address: any plan, any residual, any kind of part.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.batch import Batch
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.hub import Pretrained
from deepseek_jax.infer.decode import PlacedModel, Variables
from deepseek_jax.layers.context import Context, text_context
from deepseek_jax.models.decoder import Decoder, canonical
from deepseek_jax.models.plan import Block
from deepseek_jax.models.stack import TransformerBlock
from deepseek_jax.sharding.rules import Rules
from deepseek_jax.train.objective import batch_context


class Call(NamedTuple):
  """One call of a method of a Flax module, after it returned.

  Attributes:
    module: whose method it is; its variables can be read.
    method: its name.
    arguments: by position.
    options: by name.
    result: what it returned.
  """

  module: nn.Module
  method: str
  arguments: tuple[Any, ...]
  options: dict[str, Any]
  result: Any


Reader = Callable[[Call], Any]
"""Looks at one call in a layer and returns arrays to keep, or None to pass it by."""


class Visit(NamedTuple):
  """The model after some layers.

  Attributes:
    layer: the layer that was just run, from 0; -1 is the embedding.
    stream: the residual stream after it, [B, T, D] under the plain residual.
    seen: what the reader kept of each call in the layer, in order.
  """

  layer: int
  stream: Any
  seen: tuple[Any, ...]


def walk(model: Pretrained, context: Context, read: Reader | None = None) -> Iterator[Visit]:
  """Runs the layers of a model one after the other.

  Args:
    model: the model.
    context: tokens [B, T] and facts about them.
    read: what to keep of the calls in each layer; a function that is hashable, such as one at the
      top of a module. MTP modules are not visited.

  Yields:
    The embedding, then every layer.
  """
  decoder = model.decoder
  segments = decoder.segments
  layers = {
    name: canonical(tree, segments).get('layers', {}) for name, tree in model.variables.items()
  }
  placed = PlacedModel(decoder, model.variables)
  stream = placed.call(_open, context)
  yield Visit(-1, stream, ())
  context = decoder.inner(context)
  for index, block in enumerate(decoder.config.layers()):
    variables = {name: tree.get(str(index), {}) for name, tree in layers.items()}
    with placed.on_mesh():
      stream, seen = _run_layer(block, read, variables, stream, context)
    yield Visit(index, stream, seen)


def read_out(model: Pretrained, stream: Any, context: Context) -> jax.Array:
  """Returns the logits [B, T, V] float32 that final norm and head make of a stream."""
  return PlacedModel(model.decoder, model.variables).call(_read_out, stream, context)


@functools.partial(jax.jit, static_argnums=0)
def _open(decoder: Decoder, variables: Variables, context: Context) -> Any:
  def forward(module: Decoder, context: Context) -> Any:
    return module.open.open(module.embed(context.tokens, context))

  return decoder.apply(variables, context, method=forward)


@functools.partial(jax.jit, static_argnums=0)
def _read_out(decoder: Decoder, variables: Variables, stream: Any, context: Context) -> jax.Array:
  def forward(module: Decoder, stream: Any, context: Context) -> jax.Array:
    return module.logits(module.norm(module.close.close(stream)), context)

  logits: Any = decoder.apply(variables, stream, context, method=forward)
  return logits


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_layer(
  block: Block, read: Reader | None, variables: Variables, stream: Any, context: Context
) -> tuple[Any, tuple[Any, ...]]:
  seen = []

  def intercept(function, arguments, options, place):
    result = function(*arguments, **options)
    kept = read and read(Call(place.module, place.method_name, arguments, options, result))
    if kept is not None:
      seen.append(kept)
    return result

  with nn.intercept_methods(intercept):
    stream, _ = TransformerBlock(block).apply(variables, stream, context)
  return stream, tuple(seen)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Passage:
  """A text as the model reads it.

  Attributes:
    context: of its tokens [1, T].
    pieces: [T] what each token stands for; `⟨bos⟩` for the one that begins a document.
  """

  context: Context
  pieces: tuple[str, ...]


def passage(model: Pretrained, prompt: str | Sequence[int]) -> Passage:
  """Reads a text, which becomes bos and its tokens, or token ids [T] as they are.

  Raises:
    ConfigError: there is no token, or one that the model does not know.
  """
  ids = model.generator.encode(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
  vocab = model.decoder.config.vocab
  if not ids or not all(0 <= i < vocab for i in ids):
    raise ConfigError(f'prompt: expected at least 1 token id from 0 to {vocab - 1}, found {ids}')
  context = text_context(jnp.asarray([ids], jnp.int32))
  return Passage(context=context, pieces=tuple(piece_of(model.tokenizer, i) for i in ids))


def piece_of(tokenizer: Tokenizer, token: int) -> str:
  """Returns what a token stands for; if that is no text, `⟨bos⟩` or the like, or its number."""
  names = {tokenizer.pad: '⟨pad⟩', tokenizer.eos: '⟨eos⟩', tokenizer.bos: '⟨bos⟩'}
  if token in tokenizer.specials:
    return names.get(token, f'⟨{token}⟩')
  return (tokenizer.decode([token]) if token < tokenizer.vocab_size else '') or f'⟨{token}⟩'


def context_of(model: Pretrained, source: str | Sequence[int] | Batch) -> Context:
  """Returns the context of a text, of token ids, or of a batch [B, T]."""
  if isinstance(source, Batch):
    return batch_context(jax.tree.map(np.asarray, source), Rules())
  return passage(model, source).context
