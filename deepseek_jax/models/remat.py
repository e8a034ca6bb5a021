"""What the backward pass recomputes instead of remembering, and how layers are grouped for it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from deepseek_jax.core.config import ConfigError
from deepseek_jax.formats.int8 import decode, encode
from deepseek_jax.models.plan import Segment, unroll

SAVED_NAMES = ('attention', 'feed_forward')
"""Activations that a block marks: the outputs [B, T, D] of its two sublayers."""

REPORTS = ('losses', 'observed')
"""Collections that layers write."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EveryLayer:
  """Remembers the stream between scan steps and recomputes what is inside a layer."""

  def regroup(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Returns the plan as it is."""
    return tuple(segments)

  def wrap(self, module: Any, scanned: bool) -> Any:
    """Returns the module class with rematerialisation."""
    return nn.remat(module, prevent_cse=not scanned)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquareRoot:
  """Remembers the stream every √L layers, and recomputes √L layers at a time.

  Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
  """

  def regroup(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Returns a plan whose scan steps run about √L layers each."""
    longest = max(part.repeats for part in segments)
    return unroll(segments, max(math.isqrt(longest), 1))

  def wrap(self, module: Any, scanned: bool) -> Any:
    """Returns the module class with rematerialisation."""
    return nn.remat(module, prevent_cse=not scanned)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Save:
  """Remembers the named activations and recomputes the others.

  Attributes:
    names: from `attention` and `feed_forward`, the outputs of a block's sublayers.
  """

  names: tuple[str, ...] = ('attention',)

  def __post_init__(self):
    wrong = [name for name in self.names if name not in SAVED_NAMES]
    if wrong:
      raise ConfigError(f'`names` has {wrong}; blocks mark {", ".join(SAVED_NAMES)}')

  def regroup(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Returns the plan as it is."""
    return tuple(segments)

  def wrap(self, module: Any, scanned: bool) -> Any:
    """Returns the module class with rematerialisation."""
    policy = jax.checkpoint_policies.save_only_these_names(*self.names)
    return nn.remat(module, prevent_cse=not scanned, policy=policy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compressed:
  """Remembers the stream between scan steps in 8 bits and recomputes what is inside a layer.

  The forward pass is exact: only what the backward pass recomputes starts from rounded numbers. A
  token whose scores nearly tie may there be sent to another expert than in the forward pass.

  Attributes:
    block: neighbouring channels that share a scale; 4 / block bytes an element beside the 1.
  """

  block: int = 64

  def __post_init__(self):
    if self.block < 1:
      raise ConfigError(f'`block` is {self.block}; expected 1 or more channels')

  def regroup(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Returns the plan as it is."""
    return tuple(segments)

  def wrap(self, module: Any, scanned: bool) -> Any:
    """Returns the module class with rematerialisation from rounded inputs."""
    return _remember_rounded(module, self.block, scanned)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unrolled:
  """Remembers everything, and runs every layer by itself: for models that are used.

  A scan copies the weights of each layer out of the array of all layers before it multiplies with
  them, all experts among them. Where few tokens are read at once on a CPU, that is most of the
  time. Programs are larger, and so take longer to compile.
  """

  def regroup(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Returns a plan without scans."""
    return unroll(segments, max(part.repeats for part in segments))

  def wrap(self, module: Any, scanned: bool) -> Any:
    """Returns the module class as it is."""
    del scanned
    return module


Remat = EveryLayer | SquareRoot | Save | Compressed | Unrolled


def _remember_rounded(module: Any, block: int, scanned: bool) -> Any:
  """Returns a subclass whose backward pass recomputes from its stream in 8 bits."""

  class Rounded(module):
    """The module; variables, results and what it reports are the same."""

    def __call__(self, stream: Any, context: Any, caches: Any = None) -> Any:
      """Runs the module on a stream such as [B, T, D]."""
      if self.is_initializing():
        return super().__call__(stream, context, caches)
      reports = [name for name in REPORTS if self.is_mutable_collection(name)]
      names = {field.name for field in dataclasses.fields(module)} - {'parent', 'name'}
      inner = module(**{name: getattr(self, name) for name in names}, parent=None)

      # Where the module is run again, it draws the same noise.
      rngs = {'noise': self.make_rng('noise')} if self.has_rng('noise') else {}

      def run(variables: Any, stream: Any, caches: Any, given: Any) -> Any:
        context, rngs = given
        return inner.apply(variables, stream, context, caches, mutable=reports, rngs=rngs)

      variables = {name: dict(self.variables.get(name, {})) for name in ('params', 'buffers')}
      rounded = _recompute_rounded(run, block, scanned)
      result, reported = rounded(variables, stream, caches, (context, rngs))
      for collection, values in reported.items():
        for name, value in values.items():
          self.put_variable(collection, name, value)
      return result

  Rounded.__name__ = Rounded.__qualname__ = module.__name__
  return Rounded


def _recompute_rounded(run: Any, block: int, scanned: bool) -> Any:
  """Returns `run(variables, stream, caches, given)` with a backward pass of its own."""

  def forward(variables: Any, stream: Any, caches: Any, given: Any) -> Any:
    kept = jax.tree.map(lambda x: encode(x, block), stream)
    return run(variables, stream, caches, given), (variables, kept, caches, given)

  def backward(remembered: Any, cotangents: Any) -> Any:
    variables, kept, caches, given = remembered
    # A stream goes out as it came in: same tree, same dtypes.
    like = cotangents[0][0]
    if not scanned:
      # Else the compiler may recompute every segment at once, before any is needed.
      kept, like = jax.lax.optimization_barrier((kept, like))
    stream = jax.tree.map(lambda leaf, pair: decode(pair, block, leaf.dtype), like, kept)
    _, pull = jax.vjp(lambda *inputs: run(*inputs, given), variables, stream, caches)
    (_, caches_cotangent), reported = cotangents
    return *pull(((like, caches_cotangent), reported)), None

  recompute = jax.custom_vjp(run)
  recompute.defvjp(forward, backward)
  return recompute
