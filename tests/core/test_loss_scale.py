"""Rules of the loss scale, against plain Python that follows their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.loss_scale import LARGEST, BackOff, GradientNorm, Static
from deepseek_jax.core.override import override_from_text
from deepseek_jax.core.precision import Float16


def scales(rule, steps) -> list[float]:
  """The scale of each step, and of the one after; a step is its norm, inf where it overflows."""
  state = rule.start()
  found = [float(state.scale)]
  update = jax.jit(rule.update)
  for norm in steps:
    state = update(state, jnp.bool_(math.isinf(norm)), jnp.float32(norm))
    found.append(float(state.scale))
  return found


def test_static_never_moves():
  assert scales(Static(scale=64.0), [1.0, math.inf, 1e9]) == [64.0] * 4


def test_back_off_halves_and_doubles():
  """A doubling after two clean steps in a row; an overflow begins the count anew."""
  rule = BackOff(initial=8.0, interval=2, minimum=2.0, maximum=16.0)
  inf = math.inf
  steps = [1.0, inf, 1.0, 1.0, 1.0, inf, inf, inf, inf, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
  assert scales(rule, steps) == [
    8, 8, 4, 4, 8, 8, 4, 2, 2, 2, 2, 4, 4, 8, 8, 16, 16, 16,
  ]  # fmt: skip


def oracle(rule: GradientNorm, steps) -> list[float]:
  """The documented formula in float64; statistics are kept as lists and weighed at the end."""
  seen: list[float] = []
  shares: list[float] = []
  penalty, clean, found = 0, 0, [rule.first]
  for norm in steps:
    if math.isinf(norm):
      penalty, clean = penalty + 1, 0
    else:
      share = max(1 - rule.decay, 1 / (len(seen) + 1))
      shares = [*(weight * (1 - share) for weight in shares), share]
      seen.append(math.log2(norm))
      clean += 1
      if clean >= rule.forgiving_steps:
        penalty, clean = max(penalty - 1, 0), 0
    if seen:
      mean = np.average(seen, weights=shares)
      deviation = math.sqrt(np.average((np.array(seen) - mean) ** 2, weights=shares))
      room = math.log2(LARGEST) - rule.headroom - mean - rule.deviations * deviation
    else:
      room = math.log2(rule.first)
    found.append(min(max(2.0 ** math.floor(room - penalty), rule.minimum), rule.maximum))
  return found


@pytest.mark.parametrize('seed', range(3))
def test_gradient_norm_follows_its_formula(seed):
  generator = np.random.default_rng(seed)
  steps = np.exp(generator.normal(0, 1.5, 40)).astype(np.float32).tolist()
  steps = [math.inf if number in (0, 7, 8, 20) else norm for number, norm in enumerate(steps)]
  rule = GradientNorm(decay=0.8, forgiving_steps=4)
  found = scales(rule, steps)
  assert found == oracle(rule, steps)
  assert len(set(found)) > 4


def test_gradient_norm_keeps_clear_of_the_end():
  """Under norms of one spread, hardly any norm times its scale leaves float16."""
  norms = np.exp2(np.random.default_rng(0).normal(3, 1, 500)).astype(np.float32)
  found = np.array(scales(GradientNorm(), norms.tolist())[:-1])
  scaled = norms * found
  assert np.all(scaled[1:] < LARGEST)
  # And does not give the range away: within nine bits of the end on most steps.
  assert np.median(scaled) > LARGEST / 2**9
  assert np.all(np.frexp(found)[0] == 0.5), 'a power of two'


def test_gradient_norm_learns_what_norms_do_not_show():
  """An overflow at a norm far below the end, as of an activation, lowers the scale for a while."""
  rule = GradientNorm(forgiving_steps=3)
  found = scales(rule, [1.0, 1.0, math.inf, math.inf, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
  assert found[2:] == [2**13] + [2**12] + [2**11] * 3 + [2**12] * 3 + [2**13]


def test_a_scale_of_the_start_backs_off_too():
  """Before any norm is known, an overflow halves the first scale."""
  assert scales(GradientNorm(first=16.0), [math.inf, math.inf]) == [16, 8, 4]


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: Static(scale=1000.0), 'power of two'),
    (lambda: Static(scale=0.0), 'power of two'),
    (lambda: Static(scale=math.inf), 'power of two'),
    (lambda: BackOff(interval=0), '1 or more'),
    (lambda: BackOff(initial=2.0**30), '`minimum`'),
    (lambda: GradientNorm(decay=1.0), 'share'),
    (lambda: GradientNorm(headroom=-1.0), 'at least 0'),
  ],
)
def test_impossible_rules(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


def test_chosen_by_name():
  found, _ = override_from_text(Float16(), {'scaling': 'BackOff(interval=100)'})
  assert found == Float16(scaling=BackOff(interval=100))
