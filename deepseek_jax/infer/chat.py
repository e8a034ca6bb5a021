"""A conversation with a model, as a value: every answer gives the conversation after it."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from deepseek_jax.core.config import ConfigError
from deepseek_jax.infer.chat_template import THOUGHTS, ChatTemplate, Message
from deepseek_jax.infer.generate import TextGenerator
from deepseek_jax.infer.sample import Greedy, Sampler

OPEN, CLOSE = THOUGHTS


class Reply(NamedTuple):
  """What a model said.

  Attributes:
    answer: without its thoughts; '' if it did not come to one.
    thinking: its thoughts, or None where it had none.
    finished: it ended by itself, not because it had no more tokens.
  """

  answer: str
  thinking: str | None
  finished: bool


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Chat:
  """A conversation so far.

  Attributes:
    generator: the model and its tokenizer.
    template: how the model was taught conversations.
    messages: what was said, first to last; thoughts are left out, as the model was taught.
    reply: the last answer, or None before the first.
  """

  generator: TextGenerator
  template: ChatTemplate
  messages: tuple[Message, ...] = ()
  reply: Reply | None = None

  def ask(
    self,
    text: str,
    *,
    max_new_tokens: int = 512,
    sampler: Sampler = Greedy(),
    seed: int = 0,
  ) -> 'Chat':
    """Returns the conversation after a question and its answer; this one stays as it is.

    Args:
      text: what the user says.
      max_new_tokens: most tokens of the answer, thoughts among them.
      sampler: how a token is chosen.
      seed: of the draws.

    Raises:
      ConfigError: the template refuses the conversation, or an argument is wrong.
    """
    if not isinstance(text, str):
      raise ConfigError(f'text: found {type(text).__name__}, expected what the user says')
    asked = (*self.messages, {'role': 'user', 'content': text})
    prompt = self.template.encode(self.generator.tokenizer, asked)
    (ids,) = self.generator.continue_ids(
      [prompt], max_new_tokens=max_new_tokens, sampler=sampler, seed=seed
    )
    reply = self._read(prompt, ids, len(ids) < max_new_tokens)
    said = {'role': 'assistant', 'content': reply.answer}
    return dataclasses.replace(self, messages=(*asked, said), reply=reply)

  def _read(self, prompt: Sequence[int], ids: list[int], finished: bool) -> Reply:
    """Tells thoughts from the answer."""
    tokenizer = self.generator.tokenizer
    marks = tokenizer.marks()
    close, begun = marks.get(CLOSE), marks.get(OPEN)
    if close is None:
      begins = OPEN if tokenizer.decode(prompt).rstrip().endswith(OPEN) else ''
      return _split(begins + tokenizer.decode(ids), finished)
    if close in ids:
      place = ids.index(close)
      thoughts, rest = ids[:place], ids[place + 1 :]
      return Reply(tokenizer.decode(rest).strip(), tokenizer.decode(thoughts).strip(), finished)
    if begun in (*prompt[_last(prompt, close) :], *ids):
      return Reply('', tokenizer.decode(ids).strip(), finished)
    return Reply(tokenizer.decode(ids), None, finished)


def _last(ids: Sequence[int], mark: int) -> int:
  """Returns the place after the last `mark`; 0 where there is none."""
  return next((n for n in range(len(ids), 0, -1) if ids[n - 1] == mark), 0)


def _split(text: str, finished: bool) -> Reply:
  """Of a vocabulary in which the marks are ordinary text."""
  thoughts, mark, answer = text.partition(CLOSE)
  if mark:
    return Reply(answer.strip(), thoughts.removeprefix(OPEN).strip(), finished)
  if text.startswith(OPEN):
    return Reply('', text.removeprefix(OPEN).strip(), finished)
  return Reply(text, None, finished)
