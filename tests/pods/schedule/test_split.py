"""A backward pass in two parts against jax.grad: results, and that the work is parted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.pods.schedule.split import split


def network(weights, x, data):
  """Two products with a bend and a look at constants between them."""
  hidden = jnp.tanh(jnp.einsum('nd,df->nf', x['stream'], weights['up']) * data)
  return {'stream': x['stream'] + jnp.einsum('nf,fd->nd', hidden, weights['down'])}


def inputs(rows=5, width=3, hidden=7):
  """Weights, input, constants and cotangent of odd sizes."""
  keys = jax.random.split(jax.random.key(0), 5)
  weights = {
    'up': jax.random.normal(keys[0], (width, hidden)),
    'down': jax.random.normal(keys[1], (hidden, width)),
  }
  x = {'stream': jax.random.normal(keys[2], (rows, width))}
  data = jax.random.normal(keys[3], (hidden,))
  return weights, x, data, {'stream': jax.random.normal(keys[4], (rows, width))}


def check(function, weights, x, data, cotangent):
  """Compares all four programs with one vjp; returns them."""
  parts = split(function, weights, x, data, 'cpu')
  y, pull = jax.vjp(lambda weights, x: function(weights, x, data), weights, x)
  expected = pull(cotangent)
  found, kept = jax.jit(parts.forward)(weights, x, data)
  assert parts.kept_bytes == sum(value.nbytes for value in kept)
  for_x, left = jax.jit(parts.backward_input)(weights, data, kept, cotangent)
  assert parts.left_bytes == sum(value.nbytes for value in left)
  for_weights = jax.jit(parts.backward_weight)(weights, data, left)
  whole = jax.jit(parts.backward)(weights, data, kept, cotangent)
  close = lambda a, b: jax.tree.map(  # noqa: E731
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), a, b
  )
  close(found, y)
  close((for_weights, for_x), expected)
  close(whole[::-1], expected)
  return parts, kept, left


def products(function, *arguments):
  """Number of matrix products in a program."""
  return str(jax.make_jaxpr(function)(*arguments)).count('dot_general')


def test_parts_have_two_products_each():
  given = inputs()
  parts, kept, left = check(network, *given)
  weights, x, data, cotangent = given
  assert products(parts.forward, weights, x, data) == 2
  assert products(parts.backward_input, weights, data, kept, cotangent) == 2
  assert products(parts.backward_weight, weights, data, left) == 2
  assert products(parts.backward, weights, data, kept, cotangent) == 4
  # The input and what tanh gave; beside them, the cotangents of both products.
  assert parts.kept_bytes == 4 * (5 * 3 + 5 * 7)
  assert parts.left_bytes == 4 * (2 * 5 * 3 + 2 * 5 * 7)


def test_casts_of_weights_are_not_kept():
  def cast(weights, x, data):
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), weights)
    return network(half, x, data)

  parts, *_ = check(cast, *inputs())
  assert parts.kept_bytes == 4 * (5 * 3 + 5 * 7)


def test_recomputation_keeps_the_input_alone():
  def again(weights, x, data):
    return jax.checkpoint(network)(weights, x, data)

  parts, kept, _ = check(again, *inputs())
  assert [value.shape for value in kept] == [(5, 3)]
  weights, _, data, cotangent = inputs()
  # The second product need not be made again.
  assert products(parts.backward_input, weights, data, kept, cotangent) == 3


@jax.custom_vjp
def looped(x, experts):
  """Sum over experts, forward and backward in a loop over them, as kernels on a CPU have it."""
  return sum(x @ expert for expert in experts)


def _pull(saved, grad):
  x, experts = saved

  def body(e, carry):
    for_x, for_experts = carry
    return for_x + grad @ experts[e].T, for_experts.at[e].set(x.T @ grad)

  start = (jnp.zeros_like(x), jnp.zeros_like(experts))
  return jax.lax.fori_loop(0, experts.shape[0], body, start)


looped.defvjp(lambda x, experts: (looped(x, experts), (x, experts)), _pull)


def test_a_loop_over_experts_is_run_for_either_gradient():
  keys = jax.random.split(jax.random.key(1), 3)
  experts = jax.random.normal(keys[0], (11, 3, 3))
  x, cotangent = jax.random.normal(keys[1], (5, 3)), jax.random.normal(keys[2], (5, 3))
  parts, _, left = check(lambda w, x, _: looped(x, w), experts, x, jnp.ones(()), cotangent)
  # Not the gradient itself, which is larger than what it is made of.
  assert {value.shape for value in left} == {(5, 3)}
  assert parts.left_bytes < experts.nbytes


def test_a_platform_without_a_path():
  def chosen(w, x, _):
    return jax.lax.platform_dependent(x, cuda=lambda x: x, tpu=lambda x: -x) * w

  with pytest.raises(NotImplementedError, match='no path for cpu'):
    split(chosen, jnp.ones(3), jnp.ones(3), jnp.ones(()), 'cpu')
  assert split(chosen, jnp.ones(3), jnp.ones(3), jnp.ones(()), 'tpu').kept_bytes == 12
