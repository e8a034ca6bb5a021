"""The kinds of sampling a generation can ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.infer.sample import Greedy, Sample

ROW = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))
DRAWS = 2_000


def support(kind):
  """Every token that a kind draws from ROW."""
  keys = jax.random.split(jax.random.key(0), DRAWS)
  tokens = jax.jit(kind)(jnp.tile(ROW, (DRAWS, 1)), keys)
  assert tokens.dtype == jnp.int32
  assert tokens.shape == (DRAWS,)
  return set(np.asarray(tokens).tolist())


@pytest.mark.parametrize(
  ('kind', 'tokens'),
  [
    (Greedy(), {0}),
    (Sample(), {0, 1, 2, 3, 4}),
    (Sample(top_k=2), {0, 1}),
    (Sample(top_p=0.75), {0, 1, 2}),
    (Sample(min_p=0.3), {0, 1, 2}),
    (Sample(temperature=0.01), {0}),
    # Order: after top_k=2 the first two hold 4/7 and 3/7, so that half the mass is the first;
    # of the whole distribution it would be the first two.
    (Sample(top_k=2, top_p=0.5), {0}),
    # Temperature first: 0.5 squares the odds, and (3/4)² falls below 0.6.
    (Sample(temperature=0.5, min_p=0.6), {0}),
    (Sample(min_p=0.6), {0, 1}),
  ],
)
def test_which_tokens_are_drawn(kind, tokens):
  assert support(kind) == tokens


def test_greedy_needs_no_particular_key():
  assert Greedy()(ROW[None], jax.random.key(0)) == 0


def test_kinds_are_values():
  assert Sample(top_k=3) == Sample(top_k=3) != Sample(top_k=4)
  assert len({Greedy(), Greedy(), Sample()}) == 2


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('temperature', 0.0),
    ('temperature', float('inf')),
    ('temperature', float('nan')),
    ('top_k', 0),
    ('top_k', 2.5),
    ('top_p', 0.0),
    ('top_p', 1.1),
    ('min_p', -0.1),
    ('min_p', 1.1),
  ],
)
def test_wrong_fields_are_errors(field, value):
  with pytest.raises(ConfigError, match=f'Sample.{field}: found {value!r}'):
    Sample(**{field: value})


def test_zero_temperature_points_to_greedy_and_faults_come_together():
  with pytest.raises(ConfigError, match=r'Greedy\(\)') as caught:
    Sample(temperature=0.0, top_k=0)
  assert len(caught.value.messages) == 2
