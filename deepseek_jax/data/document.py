"""One document of text."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """A text and where it comes from.

  Attributes:
    source: the corpus or the file.
    title: its name in there.
    text: the text; never empty.
    prompt: what stands before the text and is given, not learnt; '' where all is learnt.
  """

  source: str
  title: str
  text: str
  prompt: str = ''
