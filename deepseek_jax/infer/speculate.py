"""Continues prompts several tokens a step: drafted by the model's own modules, then verified.

Greedy decoding gives the tokens that it gives one by one; sampling gives other draws, of the same
distribution.

Source: Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318; drafts by multi-token
prediction: DeepSeek-V3, arXiv 2412.19437, sections 2.2 and 5.4.3.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from deepseek_jax.infer.decode import PlacedModel, Variables
from deepseek_jax.infer.draft import (
  Progress,
  begin,
  drafts_of,
  jit_read_chunk,
  jit_step,
  start_reading,
)
from deepseek_jax.infer.prompt import Prompts, bucket, by_row, check_request, pad_prompts
from deepseek_jax.infer.sample import Greedy, Sampler
from deepseek_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculate:
  """Decodes several tokens a step, as `speculate` does: of a model with MTP modules.

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
  ) -> 'SpeculativeStream':
    """Yields (row, token id); arguments and errors are those of `speculate`."""
    return SpeculativeStream(
      decoder,
      variables,
      prompts,
      max_new_tokens=max_new_tokens,
      sampler=sampler,
      stop=stop,
      seed=seed,
      prefill_chunk=self.prefill_chunk,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acceptance:
  """How well drafts did. A row counts once for every step that it took part in.

  Attributes:
    steps: steps of rows.
    accepted: how many drafts of each module stood, first to last. One may stand beyond the end of
      its row.
    tokens: tokens that the steps gave; the first of each row comes from its prompt and is not
      among them.
  """

  steps: int
  accepted: tuple[int, ...]
  tokens: int

  @property
  def drafted(self) -> int:
    """Drafts of all modules."""
    return self.steps * len(self.accepted)

  @property
  def rate(self) -> float:
    """Share of the drafts that stood; 0 where there was none."""
    return sum(self.accepted) / max(self.drafted, 1)

  @property
  def rates(self) -> tuple[float, ...]:
    """Share of each module's drafts that stood, with all before them."""
    return tuple(accepted / max(self.steps, 1) for accepted in self.accepted)

  @property
  def tokens_per_step(self) -> float:
    """Mean tokens of a step; 0 where there was none. One by one it is 1."""
    return self.tokens / max(self.steps, 1)

  def after(self, accepted: int, tokens: int) -> 'Acceptance':
    """Counts a row's step of which `accepted` drafts stood and that gave `tokens`."""
    return Acceptance(
      steps=self.steps + 1,
      accepted=tuple(n + (k < accepted) for k, n in enumerate(self.accepted)),
      tokens=self.tokens + tokens,
    )


def speculate(
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
  """Continues every prompt, as `generate` does.

  Args:
    decoder: the model; it has modules of multi-token prediction.
    variables: its `params` and `buffers`, those of the modules among them.
    prompts: token ids, at least one a prompt.
    max_new_tokens: most tokens that are added to a prompt.
    sampler: how a token is chosen from logits.
    stop: ids that end a row; they are not part of the result.
    seed: of the draws; they depend on the seed, the row and the token's number.
    prefill_chunk: tokens of the prompts that are fed at once, to bound memory; None feeds all.

  Returns:
    The new ids of each prompt: with `Greedy`, those that `generate` gives.

  Raises:
    ConfigError: with all that is wrong with the arguments; or the model has no modules, or has a
      layer that cannot take tokens back.
  """
  pairs = SpeculativeStream(
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


class SpeculativeStream(Iterator[tuple[int, int]]):
  """Yields (row, token id) as tokens appear, several of a row at once.

  Attributes:
    acceptance: how well drafts did so far.
  """

  acceptance: Acceptance

  def __init__(
    self,
    decoder: Decoder,
    variables: Variables,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampler: Sampler = Greedy(),
    stop: frozenset[int] = frozenset(),
    seed: int = 0,
    prefill_chunk: int | None = None,
  ):
    """Refuses what `speculate` refuses, at once; its arguments are the same."""
    drafts = drafts_of(decoder)
    check_request(prompts, decoder.config.vocab, max_new_tokens, seed, prefill_chunk)
    self.acceptance = Acceptance(steps=0, accepted=(0,) * drafts, tokens=0)
    self._model = PlacedModel(decoder, variables)
    self._draws = sampler, seed
    padded = pad_prompts(prompts)
    self._rows = _Rows(len(prompts), max_new_tokens, stop)
    self._tokens = self._continue(padded, max_new_tokens, prefill_chunk)

  def __next__(self) -> tuple[int, int]:
    """The next pair."""
    return next(self._tokens)

  def _continue(
    self, prompts: Prompts, max_new_tokens: int, chunk: int | None
  ) -> Iterator[tuple[int, int]]:
    chosen, progress = self._read(prompts, max_new_tokens, chunk)
    rows, pending = self._rows, None
    if max_new_tokens > 1:
      # Sent off, and compiled, before the first tokens are waited for.
      progress, *pending = self._step(progress)
    for row, token in enumerate(np.asarray(chosen).tolist()):
      yield from rows.push(row, [token])
    while rows.alive:
      if pending is None:
        progress, *pending = self._step(progress)
      ahead = None
      if rows.remain > pending[0].shape[1]:
        # Some row goes on whatever this step gives, unless it stops: the next is sent off before
        # this one's tokens are waited for.
        progress, *ahead = self._step(progress)
      new, accepted = (np.asarray(x).tolist() for x in pending)
      for row in sorted(rows.alive):
        found = list(rows.push(row, new[row][: accepted[row] + 1]))
        self.acceptance = self.acceptance.after(accepted[row], len(found))
        yield from found
      pending = ahead

  def _step(self, progress: Progress):
    model, (sampler, seed) = self._model, self._draws
    # Equal layouts may be spelt differently, and what is spelt otherwise would be compiled again.
    return model.call(jit_step, model.place(progress), sampler, np.uint32(seed))

  def _read(self, prompts: Prompts, max_new_tokens: int, chunk: int | None):
    """Feeds the prompts; returns the first new tokens [B], and where the rows stand then."""
    model, lengths, size = self._model, prompts.lengths, chunk or bucket(prompts.longest)
    drafts = len(self.acceptance.accepted)
    slots = bucket(prompts.longest + max_new_tokens + drafts)
    reading = model.call(start_reading, len(lengths), slots)
    for start, counts in prompts.chunks(size):
      block = prompts.block(int(start[0]), size + drafts)
      reading = model.call(jit_read_chunk, reading, block, start, counts, lengths)
    sampler, seed = self._draws
    chosen = model.choose(sampler, reading.logits, seed, 0)
    tokens, count = prompts.block(0, slots), np.int32(max_new_tokens)
    with model.on_mesh():
      return chosen, begin(reading, chosen, tokens, lengths, count)


class _Rows:
  """Which rows go on, and how many tokens each may still get."""

  def __init__(self, count: int, max_new_tokens: int, stop: frozenset[int]):
    self.alive = set(range(count))
    self._left, self._stop = [max_new_tokens] * count, stop

  @property
  def remain(self) -> int:
    """Most tokens that any row may still get."""
    return max((self._left[row] for row in self.alive), default=0)

  def push(self, row: int, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields those of a row's next tokens that belong to it; ends it where it is complete."""
    for token in tokens[: self._left[row]]:
      if token in self._stop:
        self.alive.discard(row)
        return
      self._left[row] -= 1
      yield row, token
    if not self._left[row]:
      self.alive.discard(row)
