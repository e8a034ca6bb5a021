"""The one error a wrong config raises, and the near match it offers."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
  """A config holds something it must not; says every fault that was found.

  Attributes:
    messages: the faults, one text each.
  """

  messages: tuple[str, ...]

  def __init__(self, messages: str | Iterable[str]):
    """Keeps one message or several.

    Args:
      messages: one text, or any iterable of texts.
    """
    self.messages = (messages,) if isinstance(messages, str) else tuple(messages)
    super().__init__(*self.messages)

  def __str__(self) -> str:
    """The one message as it is; several as a list, one bullet a message."""
    if len(self.messages) == 1:
      return self.messages[0]
    return '\n'.join(f'- {message}' for message in self.messages)

  def __reduce__(self) -> tuple[type['ConfigError'], tuple[tuple[str, ...]]]:
    """Keeps the messages whole when the error travels between processes."""
    return type(self), (self.messages,)


def did_you_mean(name: str, options: Iterable[str]) -> str:
  """The tail of an error message that offers the option nearest to a misspelt name.

  Args:
    name: what was written.
    options: what could have been meant.

  Returns:
    '; did you mean `depth`?', or '' where nothing is near.
  """
  options = list(options)
  near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
  if not near:
    # Case is the commonest slip in names of kinds (`mla`), and difflib counts it as a difference.
    folded = {option.lower(): option for option in options}
    near = [
      folded[match] for match in difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.7)
    ]
  return f'; did you mean `{near[0]}`?' if near else ''


def wrong_sizes(config: object, names: tuple[str, ...]) -> list[str]:
  """Returns a message for each of the sizes `names` that is below 1; None is no size."""
  return [
    f'`{name}` is {size}; expected 1 or more'
    for name in names
    if (size := getattr(config, name)) is not None and size < 1
  ]
