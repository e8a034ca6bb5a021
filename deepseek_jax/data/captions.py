"""Pictures with captions to batches: a picture's places, then its caption, a row each."""

import base64
import dataclasses
import functools
import pathlib
from collections.abc import Iterable
from typing import Any, cast

import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data import store
from deepseek_jax.data.batch import Batch, Media, MediaShape
from deepseek_jax.data.drawing import OpenClipart
from deepseek_jax.data.pipeline import Prepared
from deepseek_jax.data.source import Split
from deepseek_jax.data.tokenizer import BPE, AnyTokenizer, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageCaptions:
  """Captioned pictures, one a row: bos, the picture's places, the caption, eos.

  Only the caption and its end are learned.

  Attributes:
    source: of the pictures.
    tokenizer: what makes tokens of the captions.
    slots: tokens that a picture takes the place of; the model's encoder says how many.
    length: T, tokens in a row.
    batch_size: B, rows in a batch, over all hosts.
    shuffle_seed: of the order of the training rows, from 0 to 2³² - 1.
  """

  source: OpenClipart = OpenClipart()
  tokenizer: AnyTokenizer = BPE()
  slots: int = 16
  length: int = 48
  batch_size: int = 32
  shuffle_seed: int = 0

  def __post_init__(self):
    """Refuses sizes below 1, rows without room for a word, and seeds that Grain cannot take."""
    messages = [
      f'ImageCaptions.{name}: expected at least 1, found {size}'
      for name in ('slots', 'batch_size')
      if (size := getattr(self, name)) < 1
    ]
    if self.length < self.slots + 2:
      messages.append(
        f'ImageCaptions.length: expected at least {self.slots + 2}, bos, {self.slots} `slots` and '
        f'a word; found {self.length}'
      )
    if not 0 <= self.shuffle_seed < 2**32:
      messages.append(
        f'ImageCaptions.shuffle_seed: expected 0 to {2**32 - 1}, found {self.shuffle_seed}'
      )
    if messages:
      raise ConfigError(messages)

  @property
  def media(self) -> dict[str, MediaShape]:
    """A picture a row."""
    side = self.source.side
    return {'image': MediaShape(values=(1, side, side, 3), slots=self.slots)}

  def prepare(self, cache_dir: pathlib.Path) -> 'CaptionData':
    """Decodes the pictures, or opens what an earlier run did, and encodes the captions.

    Args:
      cache_dir: folder for the decoded pictures; made if needed.

    Raises:
      ConfigError: a picture or the tokenizer cannot be read, or a caption does not fit in a row.
    """
    tokenizer = self.tokenizer.build()
    splits = {split: self._split(split, tokenizer, cache_dir) for split in ('train', 'heldout')}
    return CaptionData(config=self, tokenizer=tokenizer, **splits)

  def _split(self, split: Any, tokenizer: Tokenizer, cache_dir: pathlib.Path) -> 'CaptionSplit':
    records = self.source.records(split)
    if not records:
      raise ConfigError(f'the {split} split has no picture')
    ids = tokenizer.encode_batch([record['caption'] for record in records])
    room = self.length - self.slots - 1
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) > room:
      raise ConfigError(
        f'data.length is {self.length}, room for captions of {room} tokens; that of '
        f'{records[longest]["name"]} has {len(ids[longest])}'
      )
    return CaptionSplit(
      name=split,
      config=self,
      tokenizer=tokenizer,
      records=tuple(records),
      ids=tuple(ids),
      pictures=decoded(self.source, split, cache_dir),
    )


def decoded(source: OpenClipart, split: Split, cache_dir: pathlib.Path) -> np.ndarray:
  """The pictures [n, S, S, 3] uint8 of a split, from the store or decoded now; a read-only map.

  Raises:
    ConfigError: a picture cannot be read.
  """

  def build(scratch: pathlib.Path) -> dict[str, Any]:
    np.save(scratch / 'pictures.npy', source.pictures(source.records(split)))
    return {}

  name = store.key('pictures', {'source': source.fingerprint(), 'split': split})
  return store.entry(cache_dir, name, build).array('pictures')


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CaptionSplit:
  """Rows of one picture and its caption each; any can be read at any time.

  Attributes:
    name: 'train' or 'heldout'.
    config: what it was prepared from.
    tokenizer: made the tokens.
    records: what is known of each picture: `name`, `caption`, `keywords` and more.
    ids: [t] int32 tokens of each caption.
    pictures: [n, S, S, 3] uint8.
  """

  name: str
  config: ImageCaptions
  tokenizer: Tokenizer
  records: tuple[dict[str, Any], ...]
  ids: tuple[np.ndarray, ...]
  pictures: np.ndarray

  @property
  def length(self) -> int:
    """Places in a row."""
    return self.config.length

  @property
  def rows(self) -> int:
    """Number of rows: one a picture."""
    return len(self.records)

  @property
  def documents(self) -> int:
    """Number of pictures."""
    return len(self.records)

  @property
  def titles(self) -> tuple[str, ...]:
    """Name of each picture, by document index."""
    return tuple(record['name'] for record in self.records)

  @property
  def targets(self) -> int:
    """Tokens that are learned: those of the captions, and the end of each."""
    return sum(len(ids) + 1 for ids in self.ids)

  @property
  def occupancy(self) -> float:
    """Share of the places in the rows that hold a token or a part of a picture."""
    used = self.rows * self.config.slots + self.targets
    return used / (self.rows * self.length)

  @functools.cached_property
  def text_bytes(self) -> int:
    """UTF-8 bytes of all captions."""
    return sum(len(record['caption'].encode('utf-8')) for record in self.records)

  def data_url(self, index: int) -> str:
    """A picture as it is packed, as a text that a web page shows."""
    packed = self.config.source.packed(self.records[index])
    return 'data:image/webp;base64,' + base64.b64encode(packed).decode('ascii')

  def bits_per_byte(self, nats: float) -> float:
    """Bits per byte of caption from the summed negative log-likelihood of all targets, in nats."""
    return nats / np.log(2.0) / self.text_bytes

  def batch(self, indices: Iterable[int]) -> Batch:
    """Some rows as a batch of NumPy arrays: [B, T], and pictures [B, 1, S, S, 3].

    Args:
      indices: rows, each from 0; -1 gives a row of padding only.

    Raises:
      IndexError: a row is outside the split.
    """
    indices = [int(i) for i in indices]
    shape, slots = (len(indices), self.length), self.config.slots
    tokens, targets, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
    placeholders, documents = (np.full(shape, -1, np.int32) for _ in range(2))
    weights = np.zeros(shape, np.float32)
    pixels = np.asarray(self.pictures)
    images = np.zeros((len(indices), 1, *pixels.shape[1:]), np.uint8)
    lines = np.zeros((len(indices), 1), np.int32)
    tokenizer = self.tokenizer
    places = np.full(slots, tokenizer.pad)
    for line, index in enumerate(indices):
      if not -1 <= index < self.rows:
        raise IndexError(f'row {index} is outside the {self.rows} rows of {self.name}')
      if index < 0:
        continue
      row = np.concatenate([[tokenizer.bos], places, self.ids[index], [tokenizer.eos]])
      count = len(row) - 1
      tokens[line, :count], targets[line, :count] = row[:-1], row[1:]
      # The place before the caption's first token is the picture's last.
      weights[line, slots:count] = 1.0
      positions[line, :count] = np.arange(count)
      segments[line, :count] = 1
      documents[line, :count] = index
      placeholders[line, 1 : slots + 1] = np.arange(slots)
      images[line, 0], lines[line] = pixels[index], images.shape[2]
    fields = {
      'tokens': tokens,
      'targets': targets,
      'weights': weights,
      'positions': positions,
      'segments': segments,
      'documents': documents,
      'media': {'image': Media(images, lines)},  # type: ignore[arg-type]
      'placeholders': placeholders,
    }
    # Batch is typed for the step, where its fields are JAX arrays.
    return Batch(**cast(dict[str, Any], fields))


class CaptionData(Prepared[ImageCaptions, CaptionSplit]):
  """Prepared pictures and captions; `heldout` has drawings that `train` has no variant of."""

  def heldout_text(self) -> bytes:
    """The UTF-8 text of the held-out captions, a line each."""
    return ''.join(f'{record["caption"]}\n' for record in self.heldout.records).encode('utf-8')
