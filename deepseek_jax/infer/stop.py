"""Ends a stream of text at given texts."""

from collections.abc import Sequence


class StopBefore:
  """Lets text through up to the first of some texts; holds back what may be its beginning.

  Attributes:
    found: whether one of the texts came; nothing is let through from then on.
  """

  def __init__(self, texts: Sequence[str]):
    """Remembers the texts, none of them empty."""
    self.found = False
    self._texts = texts
    self._held = ''

  def push(self, text: str) -> str:
    """The text that is safe to show after this piece."""
    if self.found:
      return ''
    held = self._held + text
    places = [place for stop in self._texts if (place := held.find(stop)) >= 0]
    if places:
      self.found = True
      return held[: min(places)]
    cut = len(held) - max((_overlap(held, stop) for stop in self._texts), default=0)
    self._held = held[cut:]
    return held[:cut]

  def finish(self) -> str:
    """What was held back and is no stop text after all."""
    held, self._held = self._held, ''
    return '' if self.found else held


def _overlap(text: str, stop: str) -> int:
  """Characters at the end of `text` that begin `stop`."""
  sizes = range(min(len(text), len(stop) - 1), 0, -1)
  return next((size for size in sizes if text.endswith(stop[:size])), 0)
