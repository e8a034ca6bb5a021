"""Continues prompts: token ids in and out, and on top of that text in and out."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.infer.decode import (
  PlacedModel,
  Variables,
  jit_decode_step,
  jit_full_logits,
  jit_prefill,
)
from deepseek_jax.infer.prompt import (
  Prompts,
  bucket,
  by_row,
  check_request,
  pad_prompts,
  prompt_faults,
)
from deepseek_jax.infer.sample import Greedy, Sampler, Within
from deepseek_jax.infer.speculate import Speculate
from deepseek_jax.infer.stop import StopBefore
from deepseek_jax.models.decoder import Decoder


def generate(
  decoder: Decoder,
  variables: Variables,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampler: Sampler = Greedy(),
  stop: frozenset[int] = frozenset(),
  seed: int = 0,
  prefill_chunk: int | None = None,
) -> list[list[int]]:
  """Continues every prompt.

  Args:
    decoder: the model.
    variables: its `params` and `buffers`; under a mesh, wherever they lie.
    prompts: token ids, at least one a prompt; a document begins with bos.
    max_new_tokens: most tokens that are added to a prompt.
    sampler: how a token is chosen from logits.
    stop: ids that end a row; they are not part of the result.
    seed: of the draws; token j of row r depends on the seed, r and j and not on other rows.
    prefill_chunk: tokens of the prompts that are fed at once, to bound memory; None feeds all.

  Returns:
    The new ids of each prompt; fewer than `max_new_tokens` where a stop id came.

  Raises:
    ConfigError: with all that is wrong with the arguments.
  """
  pairs = stream(
    decoder,
    variables,
    prompts,
    max_new_tokens=max_new_tokens,
    sampler=sampler,
    stop=stop,
    seed=seed,
    prefill_chunk=prefill_chunk,
  )
  return by_row(pairs, len(prompts))


def stream(
  decoder: Decoder,
  variables: Variables,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampler: Sampler = Greedy(),
  stop: frozenset[int] = frozenset(),
  seed: int = 0,
  prefill_chunk: int | None = None,
) -> Iterator[tuple[int, int]]:
  """Yields (row, token id) as tokens appear; arguments and errors are those of `generate`."""
  check_request(prompts, decoder.config.vocab, max_new_tokens, seed, prefill_chunk)
  model = PlacedModel(decoder, variables)
  return _continue(model, pad_prompts(prompts), max_new_tokens, sampler, stop, seed, prefill_chunk)


def score(decoder: Decoder, variables: Variables, prompts: Sequence[Sequence[int]]) -> list[Any]:
  """Returns the float32 logits [T, V] after each token of each prompt.

  Raises:
    ConfigError: with all that is wrong with the prompts.
  """
  faults = prompt_faults(prompts, decoder.config.vocab)
  if faults:
    raise ConfigError(faults)
  padded = pad_prompts(prompts)
  tokens = padded.block(0, bucket(padded.longest))
  logits = PlacedModel(decoder, variables).call(jit_full_logits, tokens, padded.lengths)
  return [logits[row, :length] for row, length in enumerate(padded.lengths.tolist())]


def _continue(
  model: PlacedModel,
  prompts: Prompts,
  max_new_tokens: int,
  sampler: Sampler,
  stop: frozenset[int],
  seed: int,
  chunk: int | None,
) -> Iterator[tuple[int, int]]:
  lengths = prompts.lengths
  slots = bucket(prompts.longest + max_new_tokens)
  logits, caches = _read_prompts(model, prompts, slots, chunk)
  chosen = model.choose(sampler, logits, seed, 0)
  alive = set(range(len(lengths)))
  for index in range(max_new_tokens):
    ahead = chosen
    if index + 1 < max_new_tokens:
      # The next step is sent off before this one's tokens are waited for; what it computes for
      # rows that have just ended is dropped.
      logits, caches = model.call(jit_decode_step, caches, chosen, lengths + np.int32(index))
      ahead = model.choose(sampler, logits, seed, index + 1)
    for row, token in enumerate(np.asarray(chosen).tolist()):
      if row in alive and token in stop:
        alive.remove(row)
      elif row in alive:
        yield row, token
    if not alive:
      return
    chosen = ahead


def _read_prompts(
  model: PlacedModel, prompts: Prompts, slots: int, chunk: int | None
) -> tuple[jax.Array, Any]:
  """Feeds the prompts; returns the logits [B, V] after each one's last token, and the caches."""
  lengths, size = prompts.lengths, chunk or bucket(prompts.longest)
  caches = model.caches(len(lengths), slots)
  logits = None
  for begin, counts in prompts.chunks(size):
    block = prompts.block(int(begin[0]), size)
    new, caches = model.call(jit_prefill, caches, block, begin, counts)
    ends_here = (counts > 0)[:, None]
    with model.on_mesh():
      logits = new if logits is None else jnp.where(ends_here, new, logits)
  assert logits is not None  # every prompt has a token
  return logits, caches


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneByOne:
  """Decodes a token a step.

  Attributes:
    prefill_chunk: tokens of the prompts that are fed at once; None feeds all.
  """

  prefill_chunk: int | None = None

  def stream(
    self,
    decoder: Decoder,
    variables: Variables,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    stop: frozenset[int],
    seed: int,
  ) -> Iterator[tuple[int, int]]:
    """Yields (row, token id); arguments and errors are those of `generate`."""
    return stream(
      decoder,
      variables,
      prompts,
      max_new_tokens=max_new_tokens,
      sampler=sampler,
      stop=stop,
      seed=seed,
      prefill_chunk=self.prefill_chunk,
    )


Decoding = OneByOne | Speculate


class Piece(NamedTuple):
  """Some new text of one row.

  Attributes:
    row: which prompt it continues.
    text: whole characters; may be empty.
    token: the id that it came with; None for what was held back to the end.
  """

  row: int
  text: str
  token: int | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextGenerator:
  """A model with its tokenizer; continues texts as beginnings of documents.

  Attributes:
    decoder: the model.
    variables: its `params` and `buffers`.
    tokenizer: made the tokens it was trained on.
    decoding: whether tokens are made one by one, or drafted and verified.
  """

  decoder: Decoder
  variables: Variables
  tokenizer: Tokenizer
  decoding: Decoding = OneByOne()

  def encode(self, text: str) -> list[int]:
    """The ids of a text that begins a document: bos, then its tokens."""
    return [self.tokenizer.bos, *self.tokenizer.encode(text).tolist()]

  def complete(
    self,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    sampler: Sampler = Greedy(),
    stop_texts: Sequence[str] = (),
    seed: int = 0,
  ) -> list[str]:
    """Continues texts.

    Args:
      texts: beginnings of documents; '' is the very beginning.
      max_new_tokens: most tokens that are added to each.
      sampler: how a token is chosen.
      stop_texts: a continuation ends before the first of these, or where the document ends.
      seed: of the draws.

    Returns:
      The continuation of each text, without the text.

    Raises:
      ConfigError: with what is wrong with the arguments.
    """
    pieces: list[list[str]] = [[] for _ in texts]
    for piece in self.stream(
      texts, max_new_tokens=max_new_tokens, sampler=sampler, stop_texts=stop_texts, seed=seed
    ):
      pieces[piece.row].append(piece.text)
    return [''.join(row) for row in pieces]

  def continue_ids(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: Sampler = Greedy(),
    seed: int = 0,
  ) -> list[list[int]]:
    """Continues token ids [T] up to the end of their documents, which is left out.

    Arguments and errors are otherwise those of `complete`.
    """
    return by_row(self._ids(prompts, max_new_tokens, sampler, seed), len(prompts))

  def _ids(
    self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampler: Sampler, seed: int
  ) -> Iterator[tuple[int, int]]:
    if self.decoder.config.vocab > self.tokenizer.vocab_size:
      # A vocabulary may be padded to a round size; the tokens beyond the last have no text.
      sampler = Within(vocab=self.tokenizer.vocab_size, sampler=sampler)
    return self.decoding.stream(
      self.decoder,
      self.variables,
      prompts,
      max_new_tokens=max_new_tokens,
      sampler=sampler,
      stop=frozenset({self.tokenizer.eos}),
      seed=seed,
    )

  def stream(
    self,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    sampler: Sampler = Greedy(),
    stop_texts: Sequence[str] = (),
    seed: int = 0,
  ) -> Iterator[Piece]:
    """Yields a piece of text for each token as it appears.

    Arguments and errors are those of `complete`.
    """
    if isinstance(texts, str):
      raise ConfigError(f'texts: found the text {texts!r:.60}, expected a list of texts')
    if isinstance(stop_texts, str) or not all(stop_texts):
      raise ConfigError(f'stop_texts: found {stop_texts!r}, expected texts that are not empty')
    prompts = [self.encode(text) for text in texts]
    tokens = self._ids(prompts, max_new_tokens, sampler, seed)
    return self._decode(tokens, len(texts), tuple(stop_texts))

  def _decode(
    self, tokens: Iterator[tuple[int, int]], rows: int, stop_texts: tuple[str, ...]
  ) -> Iterator[Piece]:
    characters = [self.tokenizer.stream() for _ in range(rows)]
    ends = [StopBefore(stop_texts) for _ in range(rows)]
    for row, token in tokens:
      if ends[row].found:
        continue
      yield Piece(row, ends[row].push(characters[row].push(token)), token)
      if all(end.found for end in ends):
        return
    for row, end in enumerate(ends):
      held = end.push(characters[row].finish()) + end.finish()
      if held:
        yield Piece(row, held, None)


def sample_texts(
  decoder: Decoder,
  variables: Variables,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  max_new_tokens: int,
  sampler: Sampler,
  seed: int,
) -> list[dict[str, str]]:
  """Continues the prompts of a run, as training does now and then.

  Weights are arguments of what is compiled, so that only the first call of a run compiles.

  Args:
    decoder: the model.
    variables: its `params` and `buffers`, on the run's mesh.
    tokenizer: of the run.
    prompts: texts to continue.
    max_new_tokens: most tokens that are added to each.
    sampler: how a token is chosen.
    seed: of the draws.

  Returns:
    For each prompt `{'prompt': …, 'text': …}`; `text` is the continuation alone.
  """
  if not prompts:
    return []
  generator = TextGenerator(decoder=decoder, variables=variables, tokenizer=tokenizer)
  texts = generator.complete(prompts, max_new_tokens=max_new_tokens, sampler=sampler, seed=seed)
  return [{'prompt': prompt, 'text': text} for prompt, text in zip(prompts, texts)]
