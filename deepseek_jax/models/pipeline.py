"""Layers in stages: devices that each hold some of the layers and pass microbatches on.

Every stage does the same at the same time, so time comes in ticks: in one, each stage runs its
layers on one microbatch and hands the result to the next stage. While the first microbatches have
not come to the last stages, and while the last ones have left the first, stages run on something
that nobody reads: that is the bubble, and `bubble_share` says how large it is.

One run of equal layers, the longest that divides, is cut over the stages. All else (embedding, the
layers before and after, multi-token prediction, head and loss) is whole on every stage; where
`rules.batch` names the mesh axis `stage`, each stage does it for its share of the rows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from deepseek_jax.core.config import ConfigError
from deepseek_jax.models.plan import Segment
from deepseek_jax.sharding.rules import Rules, shard_count

AXIS = 'stage'
"""The mesh axis of the stages, and the logical axis of the layers that are cut over it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPipe:
  """Every stage holds neighbouring layers; a microbatch goes through the stages once.

  Of M + S - 1 ticks, S - 1 are the bubble. The backward pass goes through the ticks backwards, and
  runs the layers of each anew from what came in, which is all that is remembered of it; within
  that, `Experiment.remat` says what is remembered.

  Attributes:
    microbatches: parts M of the rows that follow each other through the stages. With accumulation,
      of the rows of each of its microbatches. What depends on which tokens are together (the room
      of `Capacity`, balance over a batch, noise) goes by these parts, on one stage as on several.

  Source: GPipe, arXiv 1811.06965, section 2.3.
  """

  microbatches: int

  def __post_init__(self):
    _check_counts(self, ('microbatches',))

  @property
  def rounds(self) -> int:
    """How often a microbatch goes through the stages."""
    return 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interleaved:
  """Every stage holds several runs of layers; a microbatch goes through the stages several times.

  A tick is V times shorter than that of `GPipe`, and so is the bubble: S - 1 of M · V + S - 1 ticks
  where S divides M. Else the last microbatches of a round leave stages idle. Streams are sent V
  times as often; in every tick a stage copies the layers it needs out of those it holds.

  Attributes:
    microbatches: parts M of the rows; see `GPipe`.
    rounds: runs of layers V that a stage holds.

  Source: Narayanan et al., arXiv 2104.04473, section 2.2 (the order of its forward passes).
  """

  microbatches: int
  rounds: int = 2

  def __post_init__(self):
    _check_counts(self, ('microbatches', 'rounds'))


Pipeline = GPipe | Interleaved


def _check_counts(kind: Any, names: Sequence[str]) -> None:
  errors = [
    f'`{name}` is {getattr(kind, name)}; expected 1 or more'
    for name in names
    if getattr(kind, name) < 1
  ]
  if errors:
    raise ConfigError(errors)


class Job(NamedTuple):
  """What a stage does in a tick.

  Attributes:
    microbatch: its number; one that there is, also where the tick is idle.
    round: which of the stage's runs of layers.
    real: False where the tick is part of the bubble.
  """

  microbatch: Any
  round: Any
  real: Any


@dataclasses.dataclass(frozen=True)
class Stages:
  """A schedule on a number of stages.

  Microbatches go in groups of as many as there are stages S: a whole group begins a round before
  any of it begins the next, so that each comes back to the first stage when that is free for it.
  The k-th job of a stage is done in tick k + its number.

  Attributes:
    schedule: the kind.
    count: stages S.
  """

  schedule: Pipeline
  count: int

  @property
  def ticks(self) -> int:
    """Ticks of a forward pass."""
    return self.finish(self.schedule.microbatches - 1) + 1

  @property
  def bubble_share(self) -> float:
    """The share of a stage's ticks that are idle, in [0, 1)."""
    return 1 - self.schedule.microbatches * self.schedule.rounds / self.ticks

  def job(self, number: Any) -> Job:
    """Returns a stage's jobs of numbers, an int array [...]; jobs that are none are not real."""
    rounds, last = self.schedule.rounds, self.schedule.microbatches - 1
    group, rest = number // (self.count * rounds), number % (self.count * rounds)
    microbatch = group * self.count + rest % self.count
    real = (number >= 0) & (microbatch <= last)
    return Job(microbatch.clip(0, last), rest // self.count, real)

  def finish(self, microbatch: int) -> int:
    """Returns the tick in which the last stage finishes a microbatch."""
    group, place = divmod(microbatch, self.count)
    rounds = self.schedule.rounds
    return (group * rounds + rounds - 1) * self.count + place + self.count - 1

  def cut(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Returns a plan in which one run of layers is cut for the stages: a segment a round.

    It is the segment with the most layers in repeats that stages and rounds divide; the repeats
    that are left over follow it.

    Args:
      segments: the plan.

    Raises:
      ConfigError: nothing is repeated as often as there are places.
    """
    places = self.count * self.schedule.rounds
    even = [part.repeats // places * places * len(part.pattern) for part in segments]
    if max(even) == 0:
      longest = max(part.repeats for part in segments)
      raise ConfigError(
        f'{self.count} stages and {self.schedule.rounds} rounds need equal layers, or equal groups '
        f'of layers, {places} times in a row; this model has them {longest} times'
      )
    at = even.index(max(even))
    part = segments[at]
    each, rest = even[at] // len(part.pattern) // self.schedule.rounds, part.repeats % places
    own = [Segment(part.pattern, each, 'stage')] * self.schedule.rounds
    after = [Segment(part.pattern, rest)] if rest else []
    return (*segments[:at], *own, *after, *segments[at + 1 :])

  def check(self, sizes: Mapping[str, int], rules: Rules, rows: int) -> list[str]:
    """Returns what is wrong with so many rows under these rules on a mesh, as messages.

    Args:
      sizes: of the axes of the mesh.
      rules: the table.
      rows: of a batch, or of a microbatch of accumulation.
    """
    errors, parts = [], self.schedule.microbatches
    if rules.stage != (AXIS,):
      errors.append(
        f'rules.stage is {rules.stage}, by which no layers lie on the mesh axis `{AXIS}`; the '
        'preset PIPELINE has them there'
      )
    shards = shard_count(rules.without(AXIS).batch, dict(sizes))
    if rows % (parts * shards):
      errors.append(
        f'{rows} rows cannot be cut into {parts} microbatches that {shards} devices share'
      )
    return errors
