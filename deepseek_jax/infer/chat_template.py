"""Conversations as the tokens that a model was taught them in."""

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import sandbox

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""What someone said: `role` ('system', 'user', 'assistant') and `content`."""

PLAIN = (
  '{{ bos_token }}{% for message in messages %}'
  "{% if message.role == 'user' %}{{ '<｜User｜>' + message.content }}"
  "{% elif message.role == 'assistant' %}"
  "{{ '<｜Assistant｜>' + message.content.split('</think>')[-1] + eos_token }}"
  '{% else %}{{ message.content }}{% endif %}'
  "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
"""The format of V3 and R1, without tools: earlier thoughts are left out."""
THINKING = PLAIN.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\\n' }}")
"""The same, and the model begins with a thought."""
THOUGHTS = ('<think>', '</think>')
"""Marks around what a model thinks before it answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
  """A Jinja template, as published models have them.

  It is run in a sandbox, where it can read nothing but what it is given.

  Attributes:
    source: the template. It sees `messages`, `add_generation_prompt`, `bos_token`, `eos_token`.
    bos: the text of the token that begins a document.
    eos: of the one that ends it.
  """

  source: str
  bos: str
  eos: str

  @functools.cached_property
  def _compiled(self) -> jinja2.Template:
    environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
    )
    environment.globals['raise_exception'] = _refuse
    environment.filters['tojson'] = _tojson
    try:
      return environment.from_string(self.source)
    except jinja2.TemplateError as error:
      raise ConfigError(f'chat template: {error}') from error

  def render(self, messages: Sequence[Message], reply: bool = True, **variables: Any) -> str:
    """Returns a conversation as one text, special tokens spelt out.

    Args:
      messages: what was said, first to last.
      reply: ends where the model is to go on.
      variables: what else the template knows, such as `thinking=True`.

    Raises:
      ConfigError: the template is wrong, or refuses the messages.
    """
    faults = [
      f'messages[{place}]: found {message!r:.60}, expected `role` and `content`'
      for place, message in enumerate(messages)
      if not isinstance(message, Mapping) or not {'role', 'content'} <= message.keys()
    ]
    if faults:
      raise ConfigError(faults)
    try:
      return self._compiled.render(
        messages=list(messages),
        add_generation_prompt=reply,
        bos_token=self.bos,
        eos_token=self.eos,
        **variables,
      )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
      raise ConfigError(f'chat template: {error}') from error

  def encode(
    self, tokenizer: Tokenizer, messages: Sequence[Message], reply: bool = True, **variables: Any
  ) -> list[int]:
    """Returns a conversation as token ids.

    Only the template makes special tokens: where a message spells one, it stays text.

    Args:
      tokenizer: makes the tokens.
      messages: what was said, first to last.
      reply: ends where the model is to go on.
      variables: what else the template knows.

    Raises:
      ConfigError: the template is wrong, or refuses the messages.
    """
    marks = tokenizer.marks()
    guard = _unused(messages)
    guarded = [_guarded(message, marks, guard) for message in messages]
    text = self.render(guarded, reply, **variables)
    ids: list[int] = []
    pattern = '|'.join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
    for part in re.split(f'({pattern})', text) if marks else [text]:
      if part in marks:
        ids.append(marks[part])
      elif part:
        ids += tokenizer.encode(part.replace(guard, '')).tolist()
    return ids


def _unused(messages: Sequence[Message]) -> str:
  """Returns a character of private use that no message has."""
  said = json.dumps(list(messages), ensure_ascii=False, default=str)
  return next(c for c in map(chr, range(0xE000, 0xF8FF)) if c not in said)


def _guarded(message: Message, marks: Mapping[str, int], guard: str) -> Message:
  """Breaks the special tokens that a message spells.

  An assistant's thoughts keep their ends, which templates look for.
  """
  if not isinstance(message, Mapping):
    return message
  kept = THOUGHTS if message.get('role') == 'assistant' else ()
  broken = [mark for mark in marks if len(mark) > 1 and mark not in kept]

  def walk(value: Any) -> Any:
    if isinstance(value, str):
      for mark in broken:
        value = value.replace(mark, mark[0] + guard + mark[1:])
      return value
    if isinstance(value, Mapping):
      return {key: walk(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
      return [walk(part) for part in value]
    return copy.copy(value)

  return {key: part if key == 'role' else walk(part) for key, part in message.items()}


def _refuse(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
  # Jinja's own escapes the characters of HTML.
  return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)
