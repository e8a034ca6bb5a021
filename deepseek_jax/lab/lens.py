"""The logit lens: what the model would say if it stopped after a layer."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.hub import Pretrained
from deepseek_jax.lab.picture import Picture, label_pieces, legible
from deepseek_jax.lab.walk import passage, piece_of, read_out, walk


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LogitLens:
  """Every layer's guess of the next token.

  Attributes:
    pieces: [T] the tokens as text.
    tokens: [T] int32 their ids.
    log_probabilities: [L + 1, T, V] float32; row 0 is read from the embedding, row l + 1 after
      layer l, the last is the model's own prediction.
    tokenizer: what makes text of ids.
  """

  pieces: tuple[str, ...]
  tokens: np.ndarray
  log_probabilities: np.ndarray
  tokenizer: Tokenizer

  def top(self, position: int, count: int = 3) -> list[list[tuple[str, float]]]:
    """Returns the likeliest next tokens after one position, with their probability.

    Args:
      position: of the token, from 0; negative counts from the last.
      count: how many tokens of each row.

    Returns:
      One list for the embedding and for each layer.
    """
    result = []
    for row in self.log_probabilities[:, position]:
      best = np.argsort(-row, kind='stable')[:count].tolist()
      result.append([(piece_of(self.tokenizer, i), float(np.exp(row[i]))) for i in best])
    return result

  def nats(self) -> np.ndarray:
    """Returns what each row pays for the text's own next tokens, [L + 1, T - 1] nats."""
    return -self.log_probabilities[:, np.arange(len(self.tokens) - 1), self.tokens[1:]]

  def plot(self) -> Picture:
    """Draws the likeliest token of every layer at every position; darker is surer."""
    best = self.log_probabilities.argmax(axis=-1)
    sure = np.exp(self.log_probabilities.max(axis=-1))
    rows, length = best.shape
    picture = Picture(figsize=(0.75 * length + 1.2, 0.36 * rows + 1.1), layout='constrained')
    axes = picture.subplots()
    image = axes.imshow(sure, cmap='Blues', vmin=0.0, vmax=1.0, aspect='auto', origin='lower')
    for row, column in np.ndindex(best.shape):
      axes.text(
        column,
        row,
        legible(piece_of(self.tokenizer, int(best[row, column]))),
        ha='center',
        va='center',
        fontsize=7,
        color='white' if sure[row, column] > 0.5 else 'black',
      )
    label_pieces(axes.xaxis, self.pieces)
    axes.set_yticks(range(rows), ['embedding', *(f'layer {i}' for i in range(rows - 1))])
    axes.set_xlabel('token read; in the field, the likeliest next one')
    picture.colorbar(image, ax=axes, label='probability')
    return picture


def logit_lens(model: Pretrained, prompt: str | Sequence[int]) -> LogitLens:
  """Reads a text, and brings the stream after every layer through final norm and head.

  The head was trained for the last layer alone: what an early layer says is a lower bound on what
  it knows.

  Args:
    model: the model.
    prompt: a text, which becomes bos and its tokens; or token ids.

  Source: nostalgebraist, 'interpreting GPT: the logit lens', 2020; its bias: Belrose et al.,
    arXiv 2303.08112, section 2.
  """
  text = passage(model, prompt)
  rows = []
  for visit in walk(model, text.context):
    logits = np.asarray(read_out(model, visit.stream, text.context)[0])
    top = logits.max(axis=-1, keepdims=True)
    rows.append(logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))
  return LogitLens(
    pieces=text.pieces,
    tokens=np.asarray(text.context.tokens[0]),
    log_probabilities=np.stack(rows),
    tokenizer=model.tokenizer,
  )
