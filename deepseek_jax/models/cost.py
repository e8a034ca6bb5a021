"""What a model costs: parameters by part, and FLOPs a token."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.core.tree import flatten
from deepseek_jax.layers.attention.nsa import NSA
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.weights import BATCH_AXES, Met
from deepseek_jax.models.decoder import Family, plan_segments
from deepseek_jax.models.encoder import encoder_layers
from deepseek_jax.models.multimodal import Multimodal
from deepseek_jax.models.plan import Block, Segment


@dataclasses.dataclass(frozen=True)
class Weight:
  """One parameter array of a model.

  Attributes:
    address: where it lies in `params`.
    shape: sizes of its axes.
    axes: logical axis names.
    used: share of it that one token meets (chosen over all experts), 0 for a look-up table.
    vectors: for a weight of an encoder, by kind of media how many vectors of one medium meet it;
      empty where tokens do.
    products: how many times over a token is multiplied with the share it meets.
  """

  address: str
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  used: float
  vectors: tuple[tuple[str, int], ...] = ()
  products: float = 1.0

  @property
  def size(self) -> int:
    """Number of parameters."""
    return math.prod(self.shape)

  @property
  def is_matrix(self) -> bool:
    """Whether a token is multiplied with it."""
    return len([axis for axis in self.axes if axis not in BATCH_AXES]) > 1 and self.used > 0


def weights_of(
  family: Family, params: Any, axes: Any, segments: Sequence[Segment] | None = None
) -> list[Weight]:
  """Lists every parameter array of a model; `params` may be shapes such as [L, D, F] alone.

  Args:
    family: the model.
    params: its parameters.
    axes: their logical axes.
    segments: the scans that they are grouped for; None is the family's own plan.
  """
  flat_axes = flatten(axes)
  blocks = dict(blocks_by_address(family, segments))
  result = []
  for address, leaf in flatten(params).items():
    names = flat_axes[address]
    met = _met(address, blocks)
    vectors = encoder_vectors(family, address) if isinstance(family, Multimodal) else ()
    look_up = vectors and address.rpartition('/')[2] in ('position', 'embedding')
    if address.startswith('embedding/') or look_up:
      met = Met(0.0)
    result.append(
      Weight(address, tuple(leaf.shape), names, met.share, vectors, products=met.products)
    )
  return result


def _met(address: str, blocks: Mapping[str, Block]) -> Met:
  """What a token does with a weight of the decoder."""
  prefix, inside, name = address.rpartition('/attention/')
  block = blocks.get(f'{prefix}/') if inside else None
  if block is not None and isinstance(block.attention, NSA):
    return block.attention.met().get(name, Met(1.0))
  prefix, inside, name = address.rpartition('/feed_forward/')
  block = blocks.get(f'{prefix}/') if inside else None
  if block is None or not isinstance(block.feed_forward, MoE):
    return Met(1.0)
  moe = block.feed_forward
  return moe.form.met(moe.experts, moe.top_k).get(name, Met(1.0))


def blocks_by_address(
  family: Family, segments: Sequence[Segment] | None = None
) -> Iterator[tuple[str, Block]]:
  """Yields (where its weights lie, block) of every block that is compiled, MTP's last.

  A block of a scan stands for all of its repeats.
  """
  for number, part in enumerate(segments or plan_segments(family)):
    for place, block in enumerate(part.pattern):
      yield f'stack/segment_{number}/block_{place}/', block
  for depth, block in enumerate(_ahead(family)):
    yield f'mtp_{depth}/block/', block


def _blocks(family: Family) -> list[Block]:
  """Every layer, and after them those of the MTP depths."""
  return family.layers() + _ahead(family)


def _ahead(family: Family) -> list[Block]:
  """The layer of each MTP depth."""
  mtp = family.mtp
  return [] if mtp is None else [mtp.block(family.layers()[-1])] * mtp.depth


def active_parameters(weights: list[Weight]) -> int:
  """Returns the parameters that one token is multiplied with, MTP modules included.

  Those of an encoder are not among them: patches meet them, which are no tokens. What several of a
  token's experts share counts once.
  """
  return round(sum(w.size * w.used for w in weights if w.is_matrix and not w.vectors))


def medium_flops(family: Family, weights: list[Weight], kind: str) -> float:
  """Returns forward FLOPs of encoding one medium of a kind; 0 where the model has no such encoder.

  What is done without weights (spectra, distances of points) is not counted.
  """
  if not isinstance(family, Multimodal) or kind not in family.encoders:
    return 0.0
  encoder = family.encoders[kind]
  products = sum(2.0 * w.size * dict(w.vectors).get(kind, 0) for w in weights if w.is_matrix)
  mixing = sum(block.attention.mixing_flops(encoder.patches) for block in encoder_layers(encoder))
  return products + mixing * encoder.patches


def encoder_vectors(family: Multimodal, address: str) -> tuple[tuple[str, int], ...]:
  """Returns how many vectors of one medium of each kind meet a weight; () if it is no encoder's."""
  part, _, rest = address.partition('/')
  result = []
  for kind, encoder in family.encoders.items():
    if part == ('image' if kind == 'tile' else kind):
      count = encoder.patches
      if rest.startswith('projection/'):
        count = encoder.slots
      elif rest.startswith('stem/'):
        count = encoder.stem_vectors.get(rest.removeprefix('stem/'), count)
      result.append((kind, count))
    elif part in ('shared', 'view', 'beside') or part.startswith('beside_'):
      result.append((kind, encoder.slots))
  return tuple(result)


def forward_flops(
  family: Family, weights: list[Weight], length: int, media: Mapping[str, int] | None = None
) -> float:
  """Returns forward FLOPs a token: 2 a parameter it is multiplied with, and what is mixed.

  Attention is counted causally, over segments of `length` tokens: packed documents that are
  shorter cost less than this. The head is counted once more for every MTP depth.
  What is done once a pass, however many tokens there are, is left to `making_flops`.

  Args:
    family: the model.
    weights: from `weights_of`.
    length: tokens in a row.
    media: how many of each kind a row has; their encoding is shared out to its tokens.
  """
  mixing = sum(
    block.attention.mixing_flops(length) + 2 * block.residual.mixing_flops(family.width)
    for block in _blocks(family)
  )
  head = family.width * family.vocab * len(_ahead(family))
  media = media or {}
  seen = sum(count * medium_flops(family, weights, kind) for kind, count in media.items()) / length
  met = round(sum(w.size * w.used * w.products for w in weights if w.is_matrix and not w.vectors))
  return 2.0 * (met + head) + mixing + seen


def training_flops(
  family: Family, weights: list[Weight], length: int, media: Mapping[str, int] | None = None
) -> float:
  """Returns FLOPs a token of a training step: forward and twice that backward, no recomputation.

  Source: the convention of PaLM, arXiv 2204.02311, appendix B.
  """
  return 3.0 * forward_flops(family, weights, length, media)


def making_flops(family: Family) -> float:
  """Returns FLOPs of making the experts' matrices, once a forward pass; 0 where they are kept.

  A training step takes three times that for each of its microbatches, beside `training_flops` for
  each of its tokens.
  """
  return sum(
    moe.form.making_flops(moe.experts, family.width, moe.hidden)
    for moe in (block.feed_forward for block in _blocks(family))
    if isinstance(moe, MoE)
  )


def active_share(family: Family, forward: float, total_steps: int) -> np.ndarray:
  """Returns what a token costs at each step of a run whose layers grow, over its full cost.

  A choice that is not active yet costs nothing; the number of active experts changes no token's
  cost. All else costs what it costs in the full model.

  Args:
    family: the model.
    forward: its `forward_flops`.
    total_steps: steps of the run.

  Returns:
    [total_steps] float64, 1 where everything is active; the mean is the share of the run's FLOPs.

  Raises:
    ConfigError: a layer grows beyond the run.
  """
  spared = np.zeros(total_steps)
  for moe in (block.feed_forward for block in _blocks(family)):
    if isinstance(moe, MoE) and moe.growth is not None:
      choice = 2.0 * 3 * family.width * moe.hidden
      stages = moe.growth.stages(moe.experts, moe.top_k, total_steps)
      ends = [since for since, _, _ in stages[1:]] + [total_steps]
      for (since, _, choices), end in zip(stages, ends, strict=True):
        spared[since:end] += choice * (moe.top_k - choices)
  return 1 - spared / forward
