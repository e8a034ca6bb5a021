"""What a model costs: parameters by part, and FLOPs a token."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from deepseek_jax.core.tree import flatten
from deepseek_jax.layers.weights import BATCH_AXES
from deepseek_jax.models.decoder import Family, plan_segments
from deepseek_jax.models.encoder import encoder_layers
from deepseek_jax.models.multimodal import Multimodal
from deepseek_jax.models.plan import Block
from deepseek_jax.models.remat import Remat


@dataclasses.dataclass(frozen=True)
class Weight:
  """One parameter array of a model.

  Attributes:
    address: where it lies in `params`.
    shape: sizes of its axes.
    axes: logical axis names.
    used: share of it that one token meets (chosen over all experts), 0 for a look-up table.
    vectors: for a weight of an encoder, vectors of one picture that meet it; None where tokens do.
  """

  address: str
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  used: float
  vectors: int | None = None

  @property
  def size(self) -> int:
    """Number of parameters."""
    return math.prod(self.shape)

  @property
  def is_matrix(self) -> bool:
    """Whether a token is multiplied with it."""
    return len([axis for axis in self.axes if axis not in BATCH_AXES]) > 1 and self.used > 0


def weights_of(family: Family, params: Any, axes: Any, remat: Remat | None = None) -> list[Weight]:
  """Lists every parameter array of a model; `params` may be shapes such as [L, D, F] alone."""
  flat_axes = flatten(axes)
  blocks = dict(_blocks(family, remat))
  result = []
  for address, leaf in flatten(params).items():
    names = flat_axes[address]
    used, vectors = 1.0, None
    if address.startswith('embedding/') or address.endswith('stem/position'):
      used = 0.0
    elif 'expert' in names:
      layer = next(block for prefix, block in blocks.items() if address.startswith(prefix))
      used = layer.feed_forward.top_k / layer.feed_forward.experts  # type: ignore[union-attr]
    if isinstance(family, Multimodal) and address.startswith('image/'):
      image = family.image
      vectors = image.slots if address.startswith('image/projection/') else image.patches
    result.append(Weight(address, tuple(leaf.shape), names, used, vectors))
  return result


def _blocks(family: Family, remat: Remat | None) -> Iterator[tuple[str, Block]]:
  for number, part in enumerate(plan_segments(family, remat)):
    for place, block in enumerate(part.pattern):
      yield f'stack/segment_{number}/block_{place}/', block
  for depth in range(0 if family.mtp is None else family.mtp.depth):
    yield f'mtp_{depth}/', family.layers()[-1]


def active_parameters(weights: list[Weight]) -> int:
  """Returns the parameters that one token is multiplied with, MTP modules included.

  Those of an encoder are not among them: patches meet them, which are no tokens.
  """
  return round(sum(w.size * w.used for w in weights if w.is_matrix and w.vectors is None))


def picture_flops(family: Family, weights: list[Weight]) -> float:
  """Returns forward FLOPs of encoding one picture; 0 for a model of text."""
  if not isinstance(family, Multimodal):
    return 0.0
  image = family.image
  products = sum(2.0 * w.size * w.vectors for w in weights if w.is_matrix and w.vectors is not None)
  mixing = sum(block.attention.mixing_flops(image.patches) for block in encoder_layers(image))
  return products + mixing * image.patches


def forward_flops(family: Family, weights: list[Weight], length: int, pictures: int = 0) -> float:
  """Returns forward FLOPs a token: 2 a parameter met, and the mixing of attention.

  Attention is counted causally, over segments of `length` tokens: packed documents that are
  shorter cost less than this. The head is counted once more for every MTP depth.

  Args:
    family: the model.
    weights: from `weights_of`.
    length: tokens in a row.
    pictures: pictures in a row; their encoding is shared out to its tokens.
  """
  depth = 0 if family.mtp is None else family.mtp.depth
  layers = family.layers()
  layers += [layers[-1]] * depth
  mixing = sum(block.attention.mixing_flops(length) for block in layers)
  head = family.width * family.vocab * depth
  seen = pictures * picture_flops(family, weights) / length
  return 2.0 * (active_parameters(weights) + head) + mixing + seen


def training_flops(family: Family, weights: list[Weight], length: int, pictures: int = 0) -> float:
  """Returns FLOPs a token of a training step: forward and twice that backward, no recomputation.

  Source: the convention of PaLM, arXiv 2204.02311, appendix B.
  """
  return 3.0 * forward_flops(family, weights, length, pictures)
