"""Sliding-window attention against its float64 twin, and the slots of its cache."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.attention.window import Window, WindowAttention


@pytest.mark.parametrize(('size', 'sinks'), [(1, 0), (3, 0), (2, 2), (20, 1)])
def test_window(size, sinks, sizes, packed, build, oracle):
  config = Window(**sizes, size=size, sinks=sinks)
  params, run = build(config)
  x, context = packed
  segments, positions = context.segments, context.positions

  def allowed(b, t, s):
    if s > t or segments[b, t] != segments[b, s]:
      return False
    return t - s < size or positions[b, s] < sinks

  want = oracle(params, config, x, positions, allowed)
  real = segments > 0
  got = np.asarray(run(params, x, context))
  np.testing.assert_allclose(got[real], want[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(('size', 'sinks'), [(1, 0), (3, 0), (2, 2), (20, 1), (3, 20)])
def test_visible_tokens(size, sinks):
  config = Window(heads=1, size=size, sinks=sinks)
  pairs = sum(t - s < size or s < sinks for t in range(9) for s in range(t + 1))
  assert config.visible_tokens(9) == pytest.approx(pairs / 9)


@pytest.mark.parametrize('blocks', [(1,) * 12, (5, 1, 6), (12,), (3, 9)])
def test_cache_holds_what_can_still_be_seen(blocks):
  module = WindowAttention(Window(heads=1, size=3, sinks=2))
  slots, held = 5, {}
  start = 0
  for length in blocks:
    # A row that has ended is padding from there on.
    positions = np.arange(start, start + length, dtype=np.int32)
    both = jnp.asarray([positions, np.where(positions < 7, positions, -1)])
    got = np.asarray(module.slots(both, slots))
    for row in range(2):
      written = [s for s in got[row] if s < slots]
      assert len(written) == len(set(written))
      held.setdefault(row, {}).update(
        {s: p for s, p in zip(got[row].tolist(), both[row].tolist()) if s < slots}
      )
    start += length
  # Sinks 0 and 1, and the last three.
  assert sorted(held[0].values()) == [0, 1, 9, 10, 11]
  assert sorted(held[1].values()) == [0, 1, 4, 5, 6]


def test_cache_is_no_longer_than_the_sequence():
  config = Window(heads=1, size=3, sinks=2)
  assert config.empty_cache(2, 4, jnp.float32).positions.shape == (2, 4)
  assert config.empty_cache(2, 400, jnp.float32).positions.shape == (2, 5)


@pytest.mark.parametrize('field', [{'size': 0}, {'sinks': -1}])
def test_wrong_fields(field):
  with pytest.raises(ConfigError, match=next(iter(field))):
    Window(heads=1, **field)
