"""Expert load: which experts read which tokens, layer by layer."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.batch import Batch
from deepseek_jax.hub import Pretrained
from deepseek_jax.lab.picture import Picture
from deepseek_jax.lab.walk import Call, context_of, piece_of, walk
from deepseek_jax.layers.moe.interface import Assignment
from deepseek_jax.train.history import LOAD_COLOURS


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ExpertLoad:
  """How often tokens of each class chose each expert.

  Attributes:
    layers: numbers of the layers that have experts.
    classes: names of the classes of tokens, the most frequent first.
    tokens: [classes] how many tokens of each were read.
    counts: one array [classes, E] int64 a layer; a row sums to K × tokens, less
      the choices that are nobody's.
  """

  layers: tuple[int, ...]
  classes: tuple[str, ...]
  tokens: np.ndarray
  counts: tuple[np.ndarray, ...]

  def shares(self, layer: int) -> np.ndarray:
    """Returns [classes, E]: of a class's choices in a layer, the share of each expert."""
    counts = self.counts[self.layers.index(layer)]
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

  def plot(self) -> Picture:
    """Draws one table a layer: orange experts read more of a class than is even, blue ones less."""
    colours = LinearSegmentedColormap.from_list('load', LOAD_COLOURS)
    count = len(self.layers)
    size = (7.2, (0.32 * len(self.classes) + 0.75) * count)
    picture = Picture(figsize=size, layout='constrained')
    grid = picture.subplots(count, 1, squeeze=False)[:, 0]
    for axes, layer in zip(grid, self.layers):
      shares = self.shares(layer)
      image = axes.imshow(shares * shares.shape[1], cmap=colours, vmin=0.0, vmax=2.0, aspect='auto')
      axes.set_title(f'layer {layer}', loc='left')
      axes.set_yticks(range(len(self.classes)), self.classes)
    grid[-1].set_xlabel('expert')
    picture.colorbar(image, ax=list(grid), label='times the even share', extend='max')
    return picture


def expert_load(
  model: Pretrained,
  source: str | Sequence[int] | Batch,
  classify: Callable[[str], str] | None = None,
) -> ExpertLoad:
  """Counts which experts the tokens of each class choose, in every layer that has experts.

  Args:
    model: the model.
    source: a text, token ids, or a batch such as `heldout(experiment)`.
    classify: from a token's text to the name of its class; None is `token_class`.

  Raises:
    ConfigError: no layer has experts.
  """
  context = context_of(model, source)
  real = np.asarray(context.real).reshape(-1)
  ids = np.asarray(context.tokens).reshape(-1)[real]
  named = {i: (classify or token_class)(piece_of(model.tokenizer, i)) for i in set(ids.tolist())}
  names = [named[i] for i in ids.tolist()]
  classes = sorted(set(names), key=lambda name: (-names.count(name), name))
  rows = np.array([classes.index(name) for name in names])
  layers, counts = [], []
  for visit in walk(model, context, read_assignment):
    if not visit.seen:
      continue
    experts, total = np.asarray(visit.seen[-1][0])[real], visit.seen[-1][1].shape[-1]
    # The last column is nobody's.
    table = np.zeros((len(classes), total + 1), np.int64)
    np.add.at(table, (rows[:, None], experts), 1)
    layers.append(visit.layer)
    counts.append(table[:, :total])
  if not layers:
    raise ConfigError('expert_load: no layer of this model has experts')
  return ExpertLoad(
    layers=tuple(layers),
    classes=tuple(classes),
    tokens=np.bincount(rows, minlength=len(classes)),
    counts=tuple(counts),
  )


def read_assignment(call: Call) -> tuple[jax.Array, jax.Array] | None:
  """Returns experts [N, K] and scores [N, E] of a call that routes tokens, None of any other."""
  if isinstance(call.result, Assignment):
    return call.result.experts, call.result.scores
  return None


def token_class(piece: str) -> str:
  """Returns what kind of token a text is: a rule of thumb for English in byte-pair pieces."""
  core = piece.strip()
  if piece.startswith('⟨'):
    return 'special'
  if not core:
    return 'white space'
  if any(letter.isdigit() for letter in core):
    return 'number'
  if core[0].isupper():
    return 'capitalised'
  if core[0].isalpha():
    return 'word' if piece[0].isspace() else 'rest of a word'
  return 'punctuation'
