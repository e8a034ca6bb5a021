"""Tables of a write-up that come out of its `results.json`: no number is copied by hand.

In a `README.md`, what stands between these comments is written by the command, and not by anybody:

  <!-- table -->                 the figure that decides, with steps and sizes
  <!-- end -->
  <!-- table max_violation -->   another figure of `FIGURES`
  <!-- end -->
  <!-- findings -->              a sentence for each variant
  <!-- end -->
"""

import re

from deepseek_jax.core.config import ConfigError, did_you_mean
from deepseek_jax.lab.results import Results
from deepseek_jax.lab.sweep_page import sentences
from deepseek_jax.lab.verdict import FIGURES, markdown

_PLACE = re.compile(r'<!-- (table|findings)(?: (\w+))? -->\n(.*?)<!-- end -->', re.DOTALL)


def fill(text: str, results: Results) -> str:
  """Returns a write-up with its tables made anew.

  Args:
    text: Markdown with places for them.
    results: of the sweep.

  Raises:
    ConfigError: there is no place, or one asks for a figure that there is not.
  """
  places = list(_PLACE.finditer(text))
  errors = [
    f'<!-- table {place[2]} -->: no such figure{did_you_mean(place[2], FIGURES)}; known: '
    f'{", ".join(FIGURES)}'
    for place in places
    if place[2] is not None and place[2] not in FIGURES
  ]
  if not places:
    errors.append(
      'no place for a table; expected <!-- table --> and, in a line below, <!-- end -->'
    )
  if errors:
    raise ConfigError(errors)

  def content(place: re.Match[str]) -> str:
    if place[1] == 'findings':
      body = '\n'.join(f'- {sentence}' for sentence in sentences(results)) + '\n'
    else:
      body = markdown(results, place[2])
    opening = place[0].split('\n', 1)[0]
    return f'{opening}\n\n{body}\n<!-- end -->'

  return _PLACE.sub(content, text)
