"""Prompts as token ids: what is wrong with them, and many of them as one array."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from deepseek_jax.core.config import ConfigError

SHORTEST_BUCKET, LONGEST_STEP = 16, 512


def bucket(length: int) -> int:
  """Rounds a length up to one of a few sizes, so that compiled functions are used again.

  Powers of two from 16 to 512, then multiples of 512.
  """
  if length > LONGEST_STEP:
    return -(-length // LONGEST_STEP) * LONGEST_STEP
  return max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())


def check_request(
  prompts: Sequence[Sequence[int]],
  vocab: int,
  max_new_tokens: int,
  seed: int,
  prefill_chunk: int | None,
) -> None:
  """Refuses what cannot be continued.

  Args:
    prompts: token ids.
    vocab: entries of the model's vocabulary.
    max_new_tokens: most tokens that are added.
    seed: of the draws.
    prefill_chunk: tokens of the prompts that are fed at once; None is all.

  Raises:
    ConfigError: with all that is wrong.
  """
  faults = prompt_faults(prompts, vocab)
  if max_new_tokens < 1:
    faults.append(f'max_new_tokens: found {max_new_tokens}, expected at least 1')
  if prefill_chunk is not None and prefill_chunk < 1:
    faults.append(f'prefill_chunk: found {prefill_chunk}, expected None or at least 1 token')
  if not 0 <= seed < 2**32:
    faults.append(f'seed: found {seed}, expected 0 to {2**32 - 1}')
  if faults:
    raise ConfigError(faults)


def by_row(pairs: Iterable[tuple[int, int]], rows: int) -> list[list[int]]:
  """Returns the token ids of each of `rows` rows, from (row, id) in the order they came."""
  result: list[list[int]] = [[] for _ in range(rows)]
  for row, token in pairs:
    result[row].append(token)
  return result


def prompt_faults(prompts: Sequence[Sequence[int]], vocab: int) -> list[str]:
  """What is wrong with prompts, as messages."""
  if not len(prompts):
    return ['prompts: found none, expected at least 1']
  faults = []
  for row, prompt in enumerate(prompts):
    if isinstance(prompt, str) or np.ndim(prompt) != 1:
      faults.append(f'prompt {row}: found {prompt!r:.60}, expected a sequence of token ids')
      continue
    ids = np.asarray(prompt)
    if not ids.size:
      faults.append(
        f'prompt {row}: found 0 tokens, expected at least 1; a document begins with the bos token'
      )
    elif not np.issubdtype(ids.dtype, np.integer):
      faults.append(f'prompt {row}: found {ids.dtype} ids, expected whole numbers')
    elif ids.min() < 0 or ids.max() >= vocab:
      wrong = ids[(ids < 0) | (ids >= vocab)]
      faults.append(
        f'prompt {row}: found token id {wrong[0]}, expected 0 to {vocab - 1}, '
        "the model's vocabulary"
      )
  return faults


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prompts:
  """Prompts as one array.

  Attributes:
    tokens: [B, longest] int32, zeros beyond a row's own.
    lengths: [B] int32.
  """

  tokens: np.ndarray
  lengths: np.ndarray

  @property
  def longest(self) -> int:
    """Tokens of the longest prompt."""
    return self.tokens.shape[1]

  def block(self, start: int, size: int) -> np.ndarray:
    """Tokens [B, size] from position `start` on, padded on the right."""
    part = self.tokens[:, start : start + size]
    return np.pad(part, ((0, 0), (0, size - part.shape[1])))

  def chunks(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the first position [B] and the number of tokens [B] of blocks that hold it all."""
    for start in range(0, self.longest, size):
      yield np.full_like(self.lengths, start), np.clip(self.lengths - start, 0, size)


def pad_prompts(prompts: Sequence[Sequence[int]]) -> Prompts:
  """Puts prompts in one array; each has at least one token."""
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens = np.zeros((len(prompts), lengths.max()), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  return Prompts(tokens=tokens, lengths=lengths)
