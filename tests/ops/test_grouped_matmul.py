"""Grouped products: every back end's form against loops in float64, with gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from deepseek_jax.ops import grouped_matmul as module
from deepseek_jax.ops.grouped_matmul import (
  grouped_matmul,
  grouped_matmul_reference,
  grouped_swiglu,
)
from deepseek_jax.ops.kernels import grouped_cpu, grouped_tpu
from deepseek_jax.ops.norm import swiglu

D, F = 6, 5

# rows, rows of each expert; what is left over is nobody's
CASES = {
  '7_rows': (7, (3, 1, 3)),
  '37_rows_idle_experts': (37, (0, 20, 0, 17, 0)),
  '45_rows_some_nobody': (45, (9, 0, 30)),
  'one_row': (1, (0, 1)),
  'all_nobody': (5, (0, 0)),
  'one_expert': (4, (4,)),
}


def inputs(case):
  rows, sizes = CASES[case]
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
  return draw(rows, D), draw(len(sizes), D, F), np.array(sizes, np.int32), draw(rows, F)


def oracle(tokens, weights, sizes, grad):
  """Returns results and gradients of rows and matrices."""
  tokens, weights, grad = (np.asarray(x, np.float64) for x in (tokens, weights, grad))
  out, back, pulled = np.zeros(grad.shape), np.zeros(tokens.shape), np.zeros(weights.shape)
  row = 0
  for e, size in enumerate(sizes):
    for _ in range(size):
      out[row] = tokens[row] @ weights[e]
      back[row] = weights[e] @ grad[row]
      pulled[e] += np.outer(tokens[row], grad[row])
      row += 1
  return out, back, pulled


def ragged(monkeypatch):
  """Makes the form of other platforms run here."""
  chosen = lambda *a, cpu, default, tpu=None: default(*a)  # noqa: E731
  monkeypatch.setattr(module.lax, 'platform_dependent', chosen)


def through_kernels(multiply, weight_gradient):
  """The two products of a back end put together as `grouped_matmul` does."""

  def run(tokens, weights, sizes, grad):
    return (
      multiply(tokens, weights, sizes),
      multiply(grad, weights, sizes, transposed=True),
      weight_gradient(tokens, grad, sizes),
    )

  return jax.jit(run)


def through_grad(function):
  def run(tokens, weights, sizes, grad):
    out, pull = jax.vjp(lambda t, w: function(t, w, sizes), tokens, weights)
    return out, *pull(grad)

  return jax.jit(run)


def small_blocks(tokens, weights, sizes, transposed=False):
  return grouped_cpu.multiply(tokens, (weights,), sizes, transposed=transposed)[0]


FORMS = {
  'here': lambda: through_grad(grouped_matmul),
  'reference': lambda: through_grad(grouped_matmul_reference),
  'cpu': lambda: through_kernels(small_blocks, grouped_cpu.weight_gradient),
  'tpu': lambda: through_kernels(
    functools.partial(grouped_tpu.multiply, interpret=True),
    functools.partial(grouped_tpu.weight_gradient, interpret=True),
  ),
  'ragged': lambda: through_grad(grouped_matmul),
}


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('form', FORMS)
def test_matmul(form, case, monkeypatch):
  arguments = inputs(case)
  if form == 'ragged':
    ragged(monkeypatch)
  if form == 'cpu':
    monkeypatch.setattr(grouped_cpu, 'block_sizes', lambda rows, experts: (4, 2))
  got = FORMS[form]()(*arguments)
  for a, b in zip(got, oracle(*arguments), strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  assert np.abs(got[0]).max() > 0.1 or case == 'all_nobody'


@pytest.mark.parametrize(
  'case', ['7_rows', '37_rows_idle_experts', '45_rows_some_nobody', 'one_row']
)
def test_swiglu(case):
  tokens, gate, sizes, grad = inputs(case)
  up = np.random.default_rng(1).standard_normal(gate.shape).astype(np.float32)

  def slow(tokens, gate, up):
    return swiglu(*(grouped_matmul_reference(tokens, w, sizes) for w in (gate, up)))

  def both(function):
    out, pull = jax.vjp(function, tokens, gate, up)
    return out, *pull(grad)

  got = jax.jit(both, static_argnums=0)(lambda *a: grouped_swiglu(*a, sizes))
  for a, b in zip(got, both(slow), strict=True):
    assert np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('form', ['here', 'tpu'])
def test_bfloat16_sums_in_float32(form):
  """A sum of 2,048 equal numbers that bfloat16 alone would stop at 256."""
  tokens, weights = jnp.ones((3, 2048), jnp.bfloat16), jnp.ones((2, 2048, 4), jnp.bfloat16)
  sizes = jnp.array([1, 2], jnp.int32)
  product = functools.partial(grouped_tpu.multiply, interpret=True)
  got = (product if form == 'tpu' else grouped_matmul)(tokens, weights, sizes)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, 2048)


def step(tokens, gate, up, down, sizes):
  def loss(tokens, gate, up, down):
    return jnp.sum(grouped_matmul(grouped_swiglu(tokens, gate, up, sizes), down, sizes) ** 2)

  return jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(tokens, gate, up, down)


def shapes(rows, experts, width, hidden, sharding=None):
  """Rows, the three stacks of matrices and sizes, in bfloat16."""

  def leaf(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  inward, outward = leaf(experts, width, hidden), leaf(experts, hidden, width)
  return leaf(rows, width), inward, inward, outward, leaf(experts, dtype=jnp.int32)


@pytest.mark.parametrize(
  ('platform', 'operation'), [('cpu', 'while'), ('tpu', 'tpu_custom_call'), ('cuda', 'ragged_dot')]
)
def test_each_platform_has_its_form(platform, operation):
  text = jax.jit(step).trace(*shapes(64, 4, D, F)).lower(lowering_platforms=(platform,)).as_text()
  assert operation in text
  for other in {'tpu_custom_call', 'ragged_dot'} - {operation}:
    assert other not in text


@pytest.mark.slow
@pytest.mark.parametrize('chip', ['v5p:2x2x1', 'v6e:2x2x1'])
@pytest.mark.parametrize('case', [(8192, 16, 7168, 2048), (1000, 8, 200, 72)], ids=str)
def test_tpu_compiles(chip, case, monkeypatch):
  """Forward and gradient for chips that are not here: whatever the sizes, the tiles fit."""
  pytest.importorskip('libtpu')
  monkeypatch.setenv('TPU_SKIP_MDS_QUERY', '1')
  device = topologies.get_topology_desc(chip, 'tpu').devices[0]
  rows, experts, width, hidden = case
  arguments = shapes(rows, experts, width, hidden, SingleDeviceSharding(device))
  text = jax.jit(step).lower(*arguments).compile().as_text()
  # Gate and up, down; and in the gradient each again for rows and for matrices.
  assert text.count('custom_call_target="tpu_custom_call"') == 9


def test_float16_has_no_kernel():
  """A TPU's kernel does not know it; whatever platform runs in the end, all forms are traced."""
  arguments = [
    jax.ShapeDtypeStruct(x.shape, jnp.float16 if x.dtype == jnp.bfloat16 else x.dtype)
    for x in shapes(64, 4, D, F)
  ]
  text = jax.jit(step).trace(*arguments).lower(lowering_platforms=('tpu',)).as_text()
  assert 'ragged_dot' in text
  assert 'tpu_custom_call' not in text
