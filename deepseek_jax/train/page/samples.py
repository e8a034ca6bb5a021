"""What the model wrote during training: a card a prompt, a picture beside its captions."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.train.history import Rows
from deepseek_jax.train.page.markup import escape, paragraph

MOST_CARDS = 48
MOST_STEPS = 4
MOST_PICTURE_CHARACTERS = 400_000
"""Of all pictures together; more would make the page slow on a phone."""
_PICTURE = re.compile(r'data:image/(?:png|jpeg|gif|webp|avif);base64,[A-Za-z0-9+/]+={0,2}')


def draw_samples(rows: Rows) -> str:
  """Returns a card for each prompt or picture, with its texts at some steps, the last one first.

  Args:
    rows: of `samples.jsonl`: 'step', 'prompt', 'text', and where a picture was shown 'image' (a
      `data:` address) and 'reference' (what is said to be on it).
  """
  if not rows:
    return paragraph('none were written', 'empty')
  groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
  for row in rows:
    key = (str(row.get('prompt') or ''), str(row.get('image') or ''))
    groups.setdefault(key, []).append(row)
  cards: list[str] = []
  spent, left = 0, 0
  # The newest prompts are the ones that say how the run stands.
  for (prompt, image), group in sorted(groups.items(), key=lambda item: -item[1][-1]['step']):
    if len(cards) == MOST_CARDS or spent + len(image) > MOST_PICTURE_CHARACTERS:
      left += 1
      continue
    spent += len(image)
    cards.append(_card(prompt, image, group))
  more = paragraph(f'and {left:,} more in samples.jsonl', 'note') if left else ''
  return f'<div class="samples">{"".join(cards)}</div>{more}'


def _card(prompt: str, image: str, group: Sequence[Mapping[str, Any]]) -> str:
  newest = group[-1]
  chosen = np.unique(np.linspace(0, len(group) - 1, min(MOST_STEPS, len(group))).round())
  said = ''.join(
    f'<p><span class="at">step {group[int(at)]["step"]:,}</span>'
    f'{escape(str(group[int(at)].get("text") or "").strip())}</p>'
    for at in chosen[::-1]
  )
  head = f'<h3>{escape(prompt)}</h3>' if prompt.strip() else ''
  reference = newest.get('reference')
  if reference:
    head += f'<p><span class="at">reference</span>{escape(reference)}</p>'
  if not image:
    return f'<article class="sample">{head}{said}</article>'
  if _PICTURE.fullmatch(image):
    shown = f'<img alt="{escape(reference or "picture shown to the model")}" src="{image}">'
  else:
    shown = paragraph('the picture is no data: address of a known format', 'empty')
  return f'<article class="sample pictured">{shown}<div>{head}{said}</div></article>'
