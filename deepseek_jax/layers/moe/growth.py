"""Progressive activation: few experts, or few choices a token, at first and more later."""

import dataclasses
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.moe.interface import Limits
from deepseek_jax.layers.weights import buffer

ACTIVE, CHOICES = 'active_experts', 'active_choices'
"""Names of the buffers, [] each: how many experts may be chosen, and by how many choices."""

type Stages = tuple[tuple[int | float, int], ...]
"""(since when, how many), first to last: a whole number is a step, a fraction a share of all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
  """Experts and choices a token that become more at stated steps, in one compiled step.

  `Growth(experts=((0, 4), (200, 8), (400, 16)), top_k=((0, 1), (0.5, 2)))` begins with 4 experts of
  which a token goes to one. How many are active is state that the training step moves on (buffers
  of the layer), so that evaluation, generation and a resumed run know it too; it never falls. A
  choice that is not active is nobody's and costs no expert any work.

  Expert i, when its time comes, is a copy of expert i mod (those active before): matrices, what the
  router knows it by, and selection bias; each array with noise, so that the two part. What the
  optimizer remembers of it is zero: nothing is known of its gradients yet, and Adam's first steps
  from zero are about half as long as usual.

  Attributes:
    experts: stages of how many experts are active, up to `MoE.experts`; None is all, always.
    top_k: stages of how many choices a token has, up to `MoE.top_k`; None is all, always.
    noise: standard deviation of the noise on a copy, as a share of that of each array.

  Source: copies of trained experts as in sparse upcycling, Komatsuzaki et al., arXiv 2212.05055,
    section 3.
  """

  experts: Stages | None = None
  top_k: Stages | None = None
  noise: float = 0.05

  def __post_init__(self):
    errors = []
    if self.experts is None and self.top_k is None:
      errors.append('neither `experts` nor `top_k` grows; give one, or `growth` None')
    if self.noise < 0:
      errors.append(f'`noise` is {self.noise}; expected 0 or more')
    for name in ('experts', 'top_k'):
      stages = getattr(self, name)
      errors += [] if stages is None else _stage_faults(name, stages)
    if errors:
      raise ConfigError(errors)

  def check(self, experts: int, top_k: int) -> list[str]:
    """Returns what is wrong with growing to `experts` and `top_k`, as messages."""
    errors = []
    for name, stages, end in (('experts', self.experts, experts), ('top_k', self.top_k, top_k)):
      if stages is not None and stages[-1][1] != end:
        errors.append(f'`{name}` ends at {stages[-1][1]}; expected the {end} of the layer')
    first = self.first(experts, top_k)
    if not errors and first[0] < first[1]:
      errors.append(f'begins with {first[0]} experts for {first[1]} choices a token')
    return errors

  def first(self, experts: int, top_k: int) -> tuple[int, int]:
    """Returns active experts and choices before the first step."""
    return (
      experts if self.experts is None else self.experts[0][1],
      top_k if self.top_k is None else self.top_k[0][1],
    )

  def stages(self, experts: int, top_k: int, total_steps: int) -> list[tuple[int, int, int]]:
    """Returns (since which step, active experts, active choices), first to last.

    Raises:
      ConfigError: a stage begins after the last step or not after the one before, or has fewer
        experts than choices.
    """
    errors = []
    tables = {}
    for name, stages, end in (('experts', self.experts, experts), ('top_k', self.top_k, top_k)):
      table = [(_step(since, total_steps), count) for since, count in stages or ((0, end),)]
      tables[name] = table
      for (before, _), (since, count) in itertools.pairwise(table):
        if since <= before:
          errors.append(f'`{name}`: {count} at step {since}, not after step {before}')
        if since >= total_steps:
          errors.append(f'`{name}`: {count} at step {since}, but the run has {total_steps} steps')
    found = []
    for since in sorted({since for table in tables.values() for since, _ in table}):
      counts = [[n for start, n in table if start <= since][-1] for table in tables.values()]
      found.append((since, counts[0], counts[1]))
      if counts[0] < counts[1]:
        errors.append(f'{counts[0]} experts for {counts[1]} choices a token at step {since}')
    if errors:
      raise ConfigError(errors)
    return found

  def build(
    self, experts: int, top_k: int, total_steps: int
  ) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns the function from a step [] int32, from 0, to active experts and choices, [] each."""
    stages = self.stages(experts, top_k, total_steps)

    def active(step: jax.Array) -> tuple[jax.Array, jax.Array]:
      stage = sum((step >= since).astype(jnp.int32) for since, _, _ in stages[1:])
      table = jnp.asarray([counts for _, *counts in stages], jnp.float32)
      return tuple(table[stage])  # type: ignore[return-value]

    return active

  def limits(self, module: nn.Module, experts: int, top_k: int) -> Limits:
    """Declares the buffers in `module`, and returns what its router may choose from now."""
    first = self.first(experts, top_k)
    active = buffer(module, ACTIVE, (), (), lambda: jnp.float32(first[0]))
    choices = buffer(module, CHOICES, (), (), lambda: jnp.float32(first[1]))
    return Limits(allowed=jnp.arange(experts) < active, top_k=choices.astype(jnp.int32))


def _step(since: int | float, total_steps: int) -> int:
  return round(since * total_steps) if isinstance(since, float) else since


def _stage_faults(name: str, stages: Stages) -> list[str]:
  if not stages or stages[0][0] != 0:
    return [f'`{name}` is {stages}; expected stages such as ((0, 4), (200, 8)), the first at 0']
  errors = []
  for since, count in stages:
    if isinstance(since, float) and not 0 <= since < 1:
      errors.append(f'`{name}`: {since} is no share of a run; expected 0 to 1, or a whole step')
    if since < 0 or count < 1:
      errors.append(f'`{name}`: found stage {(since, count)}; expected a step and a count')
  counts = [count for _, count in stages]
  if counts != sorted(counts):
    errors.append(f'`{name}` falls: {counts}; expected counts that grow')
  for (before, _), (since, _) in itertools.pairwise(stages):
    if type(before) is type(since) and since <= before:
      errors.append(f'`{name}`: {since} is not after {before}')
  return errors
