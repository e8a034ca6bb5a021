"""How far back a model finds what it is asked for."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.packed_split import heldout_batches
from deepseek_jax.data.recall import RecallData, RecallSplit
from deepseek_jax.infer.decode import PlacedModel, Variables, jit_full_logits
from deepseek_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recalled:
  """Answers to questions about pairs that lie about equally far back.

  Attributes:
    nearest: tokens between a key and where it is asked for, at least.
    farthest: at most.
    asked: questions.
    right: share whose value was the likeliest token.
  """

  nearest: int
  farthest: int
  asked: int
  right: float


def recall_by_distance(
  decoder: Decoder, variables: Variables, data: RecallData, rows: int | None = None
) -> list[Recalled]:
  """Asks for the pairs of held-out rows, and sorts the answers by how far back each pair lies.

  Args:
    decoder: the model.
    variables: `params` and `buffers`.
    data: the rows.
    rows: how many of them; None takes all.

  Returns:
    One entry for each power of two of distances that is asked for, the nearest first.

  Raises:
    ConfigError: there are fewer rows.
  """
  split = data.heldout if rows is None else _first(data.heldout, rows)
  model = PlacedModel(decoder, variables)
  distances, right = [], []
  for number, batch in enumerate(heldout_batches(split, data.config.batch_size)):
    real = np.asarray(batch.segments)[:, 0] > 0
    counts = np.where(real, split.length, 0).astype(np.int32)
    chosen = np.argmax(model.call(jit_full_logits, batch.tokens, counts), axis=-1)
    hit = chosen == np.asarray(batch.targets)
    for line in np.flatnonzero(real):
      layout = split.row(number * data.config.batch_size + int(line))[1]
      distances.append(layout.asked - layout.given[layout.pair])
      right.append(hit[line, layout.asked])
  return _binned(np.concatenate(distances), np.concatenate(right))


def recall_table(found: Sequence[Recalled]) -> str:
  """Returns a Markdown table of the distances."""
  lines = ['| tokens back | questions | right |', '|---:|---:|---:|']
  lines += [f'| {x.nearest}–{x.farthest} | {x.asked:,} | {x.right:.1%} |' for x in found]
  return '\n'.join(lines)


def _first(split: RecallSplit, rows: int) -> RecallSplit:
  if not 1 <= rows <= split.rows:
    raise ConfigError(f'{rows} rows: expected 1 to {split.rows}, which data.heldout_rows says')
  return dataclasses.replace(split, config=dataclasses.replace(split.config, heldout_rows=rows))


def _binned(distances: np.ndarray, right: np.ndarray) -> list[Recalled]:
  power = np.floor(np.log2(distances)).astype(int)
  result = []
  for p in np.unique(power):
    inside = power == p
    result.append(
      Recalled(
        nearest=2 ** int(p),
        farthest=2 ** int(p + 1) - 1,
        asked=int(inside.sum()),
        right=float(right[inside].mean()),
      )
    )
  return result
