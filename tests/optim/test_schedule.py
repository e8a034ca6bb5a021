"""Schedules against a slow oracle that follows their definition step by step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.optim.schedule import (
  Constant,
  Cosine,
  CosineWithRestarts,
  MultiStep,
  WarmupStableDecay,
)


def values(schedule, total, last=None):
  """All factors of a run, through jit with a traced step."""
  fn = jax.jit(jax.vmap(schedule.build(total)))
  return np.asarray(fn(jnp.arange(total if last is None else last)))


def cosine(share, final):
  return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(share, 1)))


ALL = [
  Constant(),
  WarmupStableDecay(warmup_steps=3),
  Cosine(warmup_steps=3),
  CosineWithRestarts(warmup_steps=3),
  MultiStep(warmup_steps=3),
]


@pytest.mark.parametrize('schedule', ALL, ids=lambda s: type(s).__name__)
def test_float32_scalar_for_any_step_type_and_peak_of_one(schedule):
  fn = schedule.build(29)
  for step in (5, np.int64(5), jnp.int32(5)):
    assert fn(step).dtype == jnp.float32
    assert fn(step).shape == ()
    assert fn(step) == fn(5)
  factors = values(schedule, 29)
  assert factors.max() == 1.0
  assert factors.min() > 0, 'every update moves the weights'
  assert schedule == type(schedule)(**vars(schedule))
  assert isinstance(hash(schedule), int)


@pytest.mark.parametrize('shape', ['linear', 'cosine', 'sqrt'])
def test_warmup_stable_decay(shape):
  schedule = WarmupStableDecay(warmup_steps=4, decay_fraction=0.3, final=0.2, shape=shape)
  fall = {
    'linear': lambda x: 1 - x,
    'cosine': lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    'sqrt': lambda x: 1 - math.sqrt(x),
  }[shape]
  expected = []
  for step in range(35):  # 9 of 30 steps decay; five more after the end
    if step < 4:
      expected.append((step + 1) / 5)
    elif step < 21:
      expected.append(1.0)
    else:
      expected.append(0.2 + 0.8 * fall(min((step - 21) / 9, 1)))
  np.testing.assert_allclose(values(schedule, 30, 35), expected, rtol=1e-5)


def test_the_shapes_differ():
  middles = {
    shape: float(
      WarmupStableDecay(warmup_steps=0, decay_fraction=1.0, final=0.0, shape=shape).build(100)(25)
    )
    for shape in ('linear', 'cosine', 'sqrt')
  }
  assert middles['sqrt'] < middles['linear'] < middles['cosine']


def test_cosine():
  expected = [(s + 1) / 4 if s < 3 else cosine((s - 3) / 20, 0.1) for s in range(27)]
  np.testing.assert_allclose(values(Cosine(warmup_steps=3), 23, 27), expected, rtol=1e-5)


def test_cosine_with_restarts():
  schedule = CosineWithRestarts(warmup_steps=2, cycles=3, growth=2.0, final=0.1)
  expected = [1 / 3, 2 / 3]
  for length in (5, 10, 20):
    expected += [cosine(i / length, 0.1) for i in range(length)]
  factors = values(schedule, 37)
  np.testing.assert_allclose(factors, expected, rtol=1e-5)
  assert [i for i in range(37) if factors[i] == 1.0] == [2, 7, 17]


@pytest.mark.parametrize('total', [7, 20, 101])
def test_restart_cycles_fill_the_run_exactly(total):
  schedule = CosineWithRestarts(warmup_steps=0, cycles=3, growth=1.3, final=0.0)
  factors = values(schedule, total, total + 3)
  assert np.count_nonzero(factors[:total] == 1.0) == 3
  np.testing.assert_allclose(factors[total:], 0, atol=1e-7)


def test_multi_step():
  schedule = MultiStep(warmup_steps=2, boundaries=(0.6, 0.9), factor=0.5)
  expected = [1 / 3, 2 / 3] + [1.0] * 10 + [0.5] * 6 + [0.25] * 2
  np.testing.assert_allclose(values(schedule, 20), expected, rtol=1e-6)


def test_multi_step_is_the_weight_of_a_loss():
  fn = MultiStep(warmup_steps=0, boundaries=(0.676,), factor=1 / 3).build(1000)
  np.testing.assert_allclose([0.3 * fn(0), 0.3 * fn(675), 0.3 * fn(676)], [0.3, 0.3, 0.1], 1e-6)


def test_multi_step_keeps_both_drops_that_fall_on_one_step():
  factors = values(MultiStep(warmup_steps=0, boundaries=(0.5, 0.6), factor=0.5), 3)
  np.testing.assert_allclose(factors, [1, 1, 0.25])


def test_multi_step_may_switch_off():
  np.testing.assert_array_equal(
    values(MultiStep(warmup_steps=0, boundaries=(0.5,), factor=0.0), 4), [1, 1, 0, 0]
  )


@pytest.mark.parametrize('kind', [Cosine, CosineWithRestarts, MultiStep, WarmupStableDecay])
def test_warmup_longer_than_the_run_is_an_error(kind):
  with pytest.raises(ConfigError, match=r'warmup_steps=11.*total_steps=10'):
    kind(warmup_steps=11).build(10)


def test_what_does_not_fit_is_an_error():
  with pytest.raises(ConfigError, match='do not fit'):
    WarmupStableDecay(warmup_steps=6, decay_fraction=0.5).build(10)
  with pytest.raises(ConfigError, match='cannot hold cycles'):
    CosineWithRestarts(warmup_steps=0, cycles=5, growth=2.0).build(10)
  with pytest.raises(ConfigError, match='past the drop at step 8'):
    MultiStep(warmup_steps=9).build(10)
  with pytest.raises(ConfigError, match='total_steps=0'):
    Constant().build(0)
  assert values(Cosine(warmup_steps=10), 10)[-1] < 1, 'warm-up as long as the run is allowed'


@pytest.mark.parametrize(
  ('kind', 'fields', 'message'),
  [
    (Constant, {'value': -1.0}, r'Constant.value: found -1.0'),
    (Cosine, {'warmup_steps': -1}, r'Cosine.warmup_steps: found -1'),
    (Cosine, {'warmup_steps': 1.5}, r'Cosine.warmup_steps: found 1.5'),
    (Cosine, {'warmup_steps': 0, 'final': 1.2}, r'Cosine.final: found 1.2'),
    (WarmupStableDecay, {'warmup_steps': 0, 'shape': 'cosin'}, r"'linear', 'cosine', 'sqrt'"),
    (WarmupStableDecay, {'warmup_steps': 0, 'decay_fraction': float('nan')}, 'found nan'),
    (CosineWithRestarts, {'warmup_steps': 0, 'cycles': 0}, 'cycles: found 0'),
    (CosineWithRestarts, {'warmup_steps': 0, 'growth': 0.0}, 'growth: found 0.0'),
    (MultiStep, {'warmup_steps': 0, 'boundaries': (0.9, 0.8)}, 'increasing'),
    (MultiStep, {'warmup_steps': 0, 'boundaries': (0.9, 1.0)}, 'increasing'),
    (MultiStep, {'warmup_steps': 0, 'boundaries': [0.9]}, 'tuple'),
  ],
)
def test_wrong_fields_are_errors(kind, fields, message):
  with pytest.raises(ConfigError, match=message):
    kind(**fields)


def test_all_faults_come_at_once():
  with pytest.raises(ConfigError) as caught:
    Cosine(warmup_steps=-1, final=2.0)
  assert len(caught.value.messages) == 2
