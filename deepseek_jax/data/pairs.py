"""Prompts and completions: the prompt is read, the completion is learnt."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data import text_file
from deepseek_jax.data.document import Document
from deepseek_jax.data.split import Split, heldout_cut, place_of


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Files of prompts and completions, .jsonl with one pair a line.

  A pair is one document: bos, prompt, completion, eos. Targets inside the prompt weigh nothing, in
  training and in evaluation: bits per byte are those of the completions. Prompt and completion are
  made into tokens apart; a blank between them belongs to one of the two. A pair longer than a row
  is cut like any text, and what is behind the cut does not see its prompt.

  Which pairs are held out depends on their prompts: those of one prompt stay on one side.

  Attributes:
    pattern: a path or glob, `**` for any depth; names end in .jsonl, plain or with .gz, .xz or
      .zst.
    heldout_fraction: share of the prompts that is held out.
    prompt: the key of the prompt in a record.
    completion: the key of the completion.
  """

  pattern: str
  _: dataclasses.KW_ONLY
  heldout_fraction: float = 0.02
  prompt: str = 'prompt'
  completion: str = 'completion'

  def __post_init__(self):
    """Refuses an empty pattern or key, one key for both, and a fraction outside (0, 1)."""
    messages = []
    if not self.pattern:
      messages.append("Pairs.pattern: expected a path or a glob, found ''")
    if not 0 < self.heldout_fraction < 1:
      messages.append(
        f'Pairs.heldout_fraction: expected between 0 and 1, found {self.heldout_fraction}'
      )
    if not self.prompt or not self.completion or self.prompt == self.completion:
      messages.append(
        'Pairs.prompt and Pairs.completion: expected two keys, '
        f'found {self.prompt!r} and {self.completion!r}'
      )
    if messages:
      raise ConfigError(messages)

  def documents(self, split: Split) -> Iterator[Document]:
    """The pairs of a split, in the order of the sorted paths.

    Raises:
      ConfigError: no file matches, or a row is not a pair; says which and where.
    """
    by_prompt, cut = _rule(self.fingerprint(), self)
    for document in self._all():
      if (_place(document, by_prompt) <= cut) == (split == 'heldout'):
        yield document

  def fingerprint(self) -> str:
    """Hexadecimal hash of the files' names and contents and of what decides the split."""
    fields = (self.heldout_fraction, self.prompt, self.completion)
    digest = hashlib.sha256(f'pairs 1 {fields!r}'.encode())
    for path in text_file.matches(self.pattern):
      with path.open('rb') as stream:
        content = hashlib.file_digest(stream, 'sha256').digest()
      digest.update(str(path).encode('utf-8', 'surrogateescape') + content)
    return digest.hexdigest()

  def _all(self) -> Iterator[Document]:
    """Every pair of every file."""
    for path in text_file.matches(self.pattern):
      yield from text_file.pairs(path, self.prompt, self.completion)


def _place(document: Document, by_prompt: bool) -> float:
  return place_of(document.prompt if by_prompt else f'{document.prompt}\0{document.text}')


@functools.lru_cache(maxsize=16)
def _rule(fingerprint: str, source: Pairs) -> tuple[bool, float]:
  """Whether prompts alone decide the split (not if there is but one), and the cut."""
  del fingerprint  # only to notice that files have changed
  by_prompt = len({place_of(document.prompt) for document in source._all()}) > 1
  places = [_place(document, by_prompt) for document in source._all()]
  return by_prompt, heldout_cut(places, source.heldout_fraction, source.pattern)
