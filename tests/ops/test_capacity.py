"""Room of experts against a loop that seats one choice after the other."""

import jax
import numpy as np
import pytest

from deepseek_jax.ops.capacity import limit_load, place_in_line

COUNT = 5
# Tokens, choices a token, experts that are chosen from; 5 is nobody.
CASES = {
  '7_tokens': (7, 2, range(5)),
  '45_tokens_idle_experts': (45, 3, (0, 3, 4)),
  'some_nobody': (37, 4, range(6)),
  'one_token': (1, 3, range(5)),
  'all_on_one_expert': (11, 1, (2,)),
}


def choices(case):
  tokens, top_k, allowed = CASES[case]
  rng = np.random.default_rng(0)
  rows = [rng.choice(list(allowed), top_k, replace=False) for _ in range(tokens)]
  return np.array(rows, np.int32)


def oracle(experts, room):
  """Who sits where: first choices of all tokens, then second ones; and who is turned away."""
  place, limited = np.zeros_like(experts), experts.copy()
  seated = [0] * (COUNT + 1)
  for k in range(experts.shape[1]):
    for n in range(experts.shape[0]):
      place[n, k] = seated[experts[n, k]]
      seated[experts[n, k]] += 1
      if place[n, k] >= room:
        limited[n, k] = COUNT
  return place, limited


@pytest.mark.parametrize('case', CASES)
def test_against_a_loop(case):
  experts = choices(case)
  found = np.asarray(jax.jit(place_in_line, static_argnums=1)(experts, COUNT))
  chosen = experts < COUNT
  np.testing.assert_array_equal(found[chosen], oracle(experts, 1)[0][chosen])
  for room in (0, 1, 4, experts.size):
    found = jax.jit(limit_load, static_argnums=(1, 2))(experts, COUNT, room)
    np.testing.assert_array_equal(found, oracle(experts, room)[1])


def test_first_choices_go_before_second_ones():
  """The last token's first choice sits before the first token's second."""
  experts = np.array([[0, 1], [2, 1], [1, 0]], np.int32)
  np.testing.assert_array_equal(limit_load(experts, 3, 1), [[0, 3], [2, 3], [1, 3]])
