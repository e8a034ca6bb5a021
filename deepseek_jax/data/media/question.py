"""Questions about pictures that are made to be asked about, with exact answers.

Question and answer are drawn first, each answer of a question equally often, and the picture is
made to fit. So the question says nothing about the answer: who does not look is right by chance.
"""

import dataclasses
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from deepseek_jax.core.config import ConfigError, did_you_mean
from deepseek_jax.data.media.figure import COLOURS, SHAPES
from deepseek_jax.data.media.made import NUMBERS, Made, Maker, pick, pick_distinct
from deepseek_jax.data.media.record import Form, Given, Learnt, Medium, Part, Records
from deepseek_jax.data.media.scene import PLACES, SIZES, Figure, describe, draw_picture
from deepseek_jax.data.split import Split

MOST_COUNTED = 4
RELATIONS = ('left of', 'right of', 'above', 'below')

ANSWERS = {
  'colour': tuple(COLOURS),
  'shape': SHAPES,
  'count': NUMBERS[: MOST_COUNTED + 1],
  'place': PLACES,
  'size': tuple(SIZES),
  'relation': ('yes', 'no'),
}
"""What may be the answer to each kind of question; all are equally frequent."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureFirst:
  """Picture, question, answer: every word of the question can attend to the picture."""

  def order(self, picture: Part, question: Part) -> tuple[Part, Part]:
    """The two parts as they are read."""
    return picture, question


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionFirst:
  """Question, picture, answer: what becomes of the picture can depend on the question."""

  def order(self, picture: Part, question: Part) -> tuple[Part, Part]:
    """The two parts as they are read."""
    return question, picture


Look = tuple[str, str]
"""Colour and shape."""


class Asked(NamedTuple):
  """A picture and a question about it.

  Attributes:
    kind: one of `ANSWERS`.
    question: the question.
    answer: the one that is right.
    figures: the picture.
  """

  kind: str
  question: str
  answer: str
  figures: tuple[Figure, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions(Maker[Asked]):
  """Pictures of figures, a question about each, and its answer; only the answer is learnt.

  Pictures of the held-out split never come in training, with any question.

  Attributes:
    about: which of colour, shape, count, place, size and relation is asked for, equally often.
    least: figures in a picture, at least; not fewer than can be counted.
    most: at most.
    side: S, pixels of a side.
    layout: what is read first.
    made: how many questions, and which are held out.
  """

  about: tuple[str, ...] = tuple(ANSWERS)
  least: int = 4
  most: int = 6
  side: int = 64
  layout: PictureFirst | QuestionFirst = PictureFirst()
  made: Made = Made()

  def __post_init__(self):
    errors = [
      f'`about` has {kind!r}; expected some of {", ".join(ANSWERS)}{did_you_mean(kind, ANSWERS)}'
      for kind in self.about
      if kind not in ANSWERS
    ]
    if not self.about or len(set(self.about)) < len(self.about):
      errors.append(f'`about` is {self.about}; expected some, each once')
    if not MOST_COUNTED <= self.least <= self.most <= len(PLACES):
      errors.append(
        f'`least` and `most` are {self.least} and {self.most}; expected {MOST_COUNTED} to '
        f'{len(PLACES)} and not less than `least`'
      )
    if self.side < 30:
      errors.append(f'`side` is {self.side}; expected 30 pixels or more')
    if errors:
      raise ConfigError(errors)

  @property
  def forms(self) -> dict[str, Form]:
    """Pictures [S, S, 3] uint8."""
    return {'image': Form(shape=(self.side, self.side, 3), dtype='uint8')}

  @property
  def chance(self) -> float:
    """Share of right answers of who guesses among those of the question's kind."""
    return float(np.mean([1 / len(ANSWERS[kind]) for kind in self.about]))

  def draw(self, rng: np.random.Generator) -> Asked:
    """Draws a question and its answer, then a picture that makes it true."""
    kind = pick(rng, self.about)
    answer = pick(rng, ANSWERS[kind])
    count = int(rng.integers(self.least, self.most + 1))
    cells = rng.permutation(len(PLACES))[:count].tolist()
    question, figures = _ASKERS[kind](rng, answer, cells)
    return Asked(kind, question, answer, tuple(sorted(figures)))

  def content(self, scene: Asked) -> str:
    """The picture, whatever is asked about it."""
    return describe(scene.figures)

  def parts(self, scene: Asked) -> tuple[Part, ...]:
    """Picture and question, then the answer."""
    read = self.layout.order(Medium(modality='image'), Given(text=scene.question))
    return (*read, Learnt(text=f' {scene.answer}'))

  def facts(self, scene: Asked) -> dict:
    """Kind, question and answer, and all answers that there could be."""
    return {
      'kind': scene.kind,
      'question': scene.question,
      'answer': scene.answer,
      'answers': list(ANSWERS[scene.kind]),
    }

  def paint(self, scene: Asked, rng: np.random.Generator, split: Split) -> list[np.ndarray]:
    """The picture [S, S, 3] uint8."""
    del split
    return [draw_picture(scene.figures, self.side, rng)]


def _figure(rng: np.random.Generator, cell: int, look: Look) -> Figure:
  return Figure(cell, pick(rng, tuple(SIZES)), *look)


def _others(
  rng: np.random.Generator, cells: list[int], colours: tuple[str, ...], shapes: tuple[str, ...]
) -> list[Figure]:
  """Figures of any of some colours and shapes, one in each cell."""
  return [_figure(rng, cell, (pick(rng, colours), pick(rng, shapes))) for cell in cells]


def _unlike(rng: np.random.Generator, cells: list[int], looks: list[Look]) -> list[Figure]:
  """Figures that differ from all of some looks, often in colour or in shape alone."""
  figures = []
  for cell in cells:
    look = looks[0]
    while look in looks:
      colour, shape = pick(rng, tuple(looks))
      change = rng.integers(3)
      look = (
        colour if change == 0 else pick(rng, tuple(COLOURS)),
        shape if change == 1 else pick(rng, SHAPES),
      )
    figures.append(_figure(rng, cell, look))
  return figures


def _without[T](options: tuple[T, ...], one: T) -> tuple[T, ...]:
  return tuple(option for option in options if option != one)


def _ask_colour(
  rng: np.random.Generator, answer: str, cells: list[int]
) -> tuple[str, list[Figure]]:
  shape = pick(rng, SHAPES)
  others = _others(rng, cells[1:], tuple(COLOURS), _without(SHAPES, shape))
  figure = _figure(rng, cells[0], (answer, shape))
  return f'What colour is the {shape}?', [figure, *others]


def _ask_shape(rng: np.random.Generator, answer: str, cells: list[int]) -> tuple[str, list[Figure]]:
  colour = pick(rng, tuple(COLOURS))
  others = _others(rng, cells[1:], _without(tuple(COLOURS), colour), SHAPES)
  figure = _figure(rng, cells[0], (colour, answer))
  return f'What shape is the {colour} figure?', [figure, *others]


def _ask_count(rng: np.random.Generator, answer: str, cells: list[int]) -> tuple[str, list[Figure]]:
  count, colours = NUMBERS.index(answer), tuple(COLOURS)
  if rng.random() < 0.5:
    colour = pick(rng, colours)
    figures = _others(rng, cells[:count], (colour,), SHAPES)
    figures += _others(rng, cells[count:], _without(colours, colour), SHAPES)
    return f'How many {colour} figures are there?', figures
  shape = pick(rng, SHAPES)
  figures = _others(rng, cells[:count], colours, (shape,))
  figures += _others(rng, cells[count:], colours, _without(SHAPES, shape))
  return f'How many figures are of the shape {shape}?', figures


def _ask_place(rng: np.random.Generator, answer: str, cells: list[int]) -> tuple[str, list[Figure]]:
  look = pick(rng, tuple(COLOURS)), pick(rng, SHAPES)
  cell = PLACES.index(answer)
  free = [c for c in cells if c != cell][: len(cells) - 1]
  return f'Where is the {" ".join(look)}?', [
    _figure(rng, cell, look),
    *_unlike(rng, free, [look]),
  ]


def _ask_size(rng: np.random.Generator, answer: str, cells: list[int]) -> tuple[str, list[Figure]]:
  look = pick(rng, tuple(COLOURS)), pick(rng, SHAPES)
  figure = Figure(cells[0], answer, *look)
  return f'Is the {" ".join(look)} small or large?', [figure, *_unlike(rng, cells[1:], [look])]


def _ask_relation(
  rng: np.random.Generator, answer: str, cells: list[int]
) -> tuple[str, list[Figure]]:
  relation = pick(rng, RELATIONS)
  colours, shapes = (pick_distinct(rng, o, 2) for o in (tuple(COLOURS), SHAPES))
  first, second = zip(colours, shapes)
  level = relation in ('above', 'below')
  # Cells in one row are neither above nor below each other: others are taken.
  near, far = sorted(rng.choice(3, 2, replace=False).tolist())
  across = rng.integers(3, size=2).tolist()
  low, high = ((3 * k + a if level else 3 * a + k) for k, a in zip((near, far), across))
  truth = (answer == 'yes') == (relation in ('left of', 'above'))
  place, other = (low, high) if truth else (high, low)
  free = [c for c in cells if c not in (place, other)][: len(cells) - 2]
  question = f'Is the {" ".join(first)} {relation} the {" ".join(second)}?'
  figures = [_figure(rng, place, first), _figure(rng, other, second)]
  return question, [*figures, *_unlike(rng, free, [first, second])]


_ASKERS = {
  'colour': _ask_colour,
  'shape': _ask_shape,
  'count': _ask_count,
  'place': _ask_place,
  'size': _ask_size,
  'relation': _ask_relation,
}


class Blind(NamedTuple):
  """How well questions are answered without a look at the picture.

  Attributes:
    chance: share of right answers of who guesses among those of the kind.
    question_only: share of right answers of who knows how often each training question, word for
      word, or its kind where it is new, had which answer.
    kinds: the same by kind, as (chance, question_only).
  """

  chance: float
  question_only: float
  kinds: dict[str, tuple[float, float]]


def blind_accuracy(records: Records) -> Blind:
  """Learns what the words of training questions say of their answers; tries it on the others."""
  exact: dict[str, Counter] = defaultdict(Counter)
  by_kind: dict[str, Counter] = defaultdict(Counter)
  for index in range(records.count('train')):
    facts = records.record('train', index).facts
    exact[facts['question']][facts['answer']] += 1
    by_kind[facts['kind']][facts['answer']] += 1
  right: dict[str, list[tuple[float, bool]]] = defaultdict(list)
  for index in range(records.count('heldout')):
    facts = records.record('heldout', index).facts
    known = exact.get(facts['question']) or by_kind[facts['kind']]
    guess = known.most_common(1)[0][0] if known else facts['answers'][0]
    right[facts['kind']].append((1 / len(facts['answers']), guess == facts['answer']))
  kinds = {kind: tuple(np.mean(rows, axis=0).tolist()) for kind, rows in sorted(right.items())}
  chance, guessed = np.mean([row for rows in right.values() for row in rows], axis=0).tolist()
  return Blind(chance, guessed, kinds)
