"""Sorting by expert, and expert layers against every token through every expert."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.ops import experts as module
from deepseek_jax.ops.expert_rows import sort_by_expert
from deepseek_jax.ops.experts import ExpertWeights, apply_experts, apply_experts_reference
from deepseek_jax.ops.kernels import grouped_cpu
from deepseek_jax.ops.kernels.grouped_cpu import block_sizes, blocks_within

D, F = 6, 5

# tokens, experts, chosen a token, experts that are chosen from
CASES = {
  '7_tokens': (7, 4, 2, range(4)),
  '37_tokens': (37, 8, 3, range(8)),
  '45_tokens_idle_experts': (45, 8, 2, (1, 2, 6)),
  'one_token': (1, 5, 2, range(5)),
  'all_on_one_expert': (13, 4, 1, (2,)),
  'every_expert': (9, 3, 3, range(3)),
  'one_expert': (3, 1, 1, (0,)),
  # The number after the last is nobody.
  'some_nobody': (37, 4, 3, range(5)),
  'one_token_nobody': (1, 4, 1, (4,)),
  'few_choices': (3, 8, 2, range(8)),
  'few_choices_nobody': (2, 9, 3, range(7, 10)),
}


def choices(case):
  tokens, count, top_k, allowed = CASES[case]
  rng = np.random.default_rng(0)
  experts = [rng.choice(list(allowed), top_k, replace=False) for _ in range(tokens)]
  return np.array(experts, np.int32), count


@pytest.mark.parametrize('case', CASES)
def test_sort_by_expert(case):
  experts, count = choices(case)
  tokens, top_k = experts.shape
  layout = jax.jit(sort_by_expert, static_argnums=1)(experts, count)
  pair, row, sizes = map(np.asarray, layout)
  np.testing.assert_array_equal(sizes, np.bincount(experts.ravel(), minlength=count)[:count])
  assert len(pair) == tokens * top_k
  assert row.shape == experts.shape
  # Row and pair are inverse to each other, and no pair is lost.
  np.testing.assert_array_equal(pair[row.ravel()], np.arange(tokens * top_k))
  # Every pair lies in the run of its expert; within a run tokens keep their order.
  ends = np.cumsum(sizes)
  for expert in range(count):
    rows = row[experts == expert]
    np.testing.assert_array_equal(rows, ends[expert] - sizes[expert] + np.arange(len(rows)))


def test_block_sizes():
  assert block_sizes(rows=3, experts=64) == (8,)
  assert block_sizes(rows=512, experts=16) == (32, 16, 8)
  assert block_sizes(rows=16384, experts=32) == (512, 256, 128, 64)
  assert block_sizes(rows=10**6, experts=8) == (512, 256, 128, 64)
  assert blocks_within(rows=3, experts=64) == (3,)
  assert blocks_within(rows=512, experts=16) == (32, 16, 8)


def inputs(case, dtype=jnp.float32):
  experts, count = choices(case)
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
  x, grad = draw(len(experts), D), draw(len(experts), D)
  weights = jnp.asarray(rng.random(experts.shape), jnp.float32)
  matrices = ExpertWeights(draw(count, D, F), draw(count, D, F), draw(count, F, D))
  return x, jnp.asarray(experts), weights, matrices, grad


def experts_oracle(x, experts, weights, matrices):
  limit = np.inf if matrices.limit is None else matrices.limit
  x, gate, up, down = (np.asarray(a, np.float64) for a in (x, *matrices))
  out = np.zeros(x.shape)
  for n, row in enumerate(np.asarray(experts)):
    for k, e in enumerate(row):
      if e == len(gate):
        continue
      g = np.minimum(x[n] @ gate[e], limit)
      hidden = g / (1 + np.exp(-g)) * np.clip(x[n] @ up[e], -limit, limit)
      out[n] += float(weights[n, k]) * hidden @ down[e]
  return out


FORMS = ('here', 'blocks_4', 'blocks_8_4_2', 'grouped')


def arrange(form, monkeypatch):
  """Makes `apply_experts` take another way than it would here."""
  if form.startswith('blocks'):
    # So small that every expert needs several.
    sizes = tuple(int(size) for size in form.split('_')[1:])
    monkeypatch.setattr(grouped_cpu, 'block_sizes', lambda rows, experts: sizes)
  elif form == 'grouped':
    # What accelerators run.
    chosen = lambda *a, cpu, default, tpu=None: default(*a)  # noqa: E731
    monkeypatch.setattr(module.lax, 'platform_dependent', chosen)


@functools.cache
def jitted(form):
  function = apply_experts_reference if form == 'reference' else apply_experts

  # A function for each form: what is compiled is known by its function.
  @jax.jit
  def run(x, experts, weights, matrices, grad):
    out, back = jax.vjp(lambda *a: function(a[0], experts, a[1], a[2]), x, weights, matrices)
    return out, *back(grad)

  return run


@pytest.mark.parametrize('form', ['reference', *FORMS])
def test_limit(form, monkeypatch):
  """What experts make is cut, and where it is no gradient flows."""
  arrange(form, monkeypatch)
  x, experts, weights, matrices, grad = inputs('45_tokens_idle_experts')
  matrices = dataclasses.replace(matrices, limit=0.3)
  jitted.cache_clear()
  out, *grads = jitted(form)(x, experts, weights, matrices, grad)
  want = experts_oracle(x, experts, weights, matrices)
  assert np.abs(want - experts_oracle(x, experts, weights, matrices.of(*matrices))).max() < 1e-9
  free = experts_oracle(x, experts, weights, dataclasses.replace(matrices, limit=None))
  assert np.abs(want - free).max() > 0.1
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  jitted.cache_clear()
  expected = jitted('reference')(x, experts, weights, matrices, grad)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected[1:]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  jitted.cache_clear()


@pytest.mark.parametrize('case', CASES)
def test_reference(case):
  *arguments, grad = inputs(case)
  got = jitted('reference')(*arguments, grad)[0]
  np.testing.assert_allclose(got, experts_oracle(*arguments), rtol=1e-5, atol=1e-5)


# What `apply_experts` itself picks takes longest to compile, and is made of the same pieces.
PAIRS = [(form, case) for form in ('blocks_4', 'blocks_8_4_2', 'grouped') for case in CASES]
PAIRS += [('here', case) for case in ('7_tokens', '45_tokens_idle_experts', 'one_token')]


@pytest.mark.parametrize(('form', 'case'), PAIRS)
def test_forward_and_gradients(form, case, monkeypatch):
  arguments = inputs(case)
  arrange(form, monkeypatch)
  got, want = jitted(form)(*arguments), jitted('reference')(*arguments)
  names = jax.tree_util.tree_leaves_with_path(want)
  assert len(names) == 6
  for (path, b), a in zip(names, jax.tree.leaves(got)):
    assert float(jnp.max(jnp.abs(b))) > 1e-3 or case == 'one_token_nobody', path
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=str(path))


@pytest.mark.parametrize('case', ['few_choices', 'few_choices_nobody', 'one_token_nobody'])
def test_few_choices(case):
  """Where there are more experts than choices, the forward pass alone goes another way."""
  *arguments, _ = inputs(case)
  got = jax.jit(apply_experts)(*arguments)
  np.testing.assert_allclose(got, experts_oracle(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('case', ['37_tokens', 'few_choices', 'few_choices_nobody'])
def test_bfloat16(case):
  *arguments, _ = inputs(case, jnp.bfloat16)
  got = jax.jit(apply_experts)(*arguments)
  assert got.dtype == jnp.bfloat16
  want = experts_oracle(*arguments)
  error = np.abs(np.asarray(got, np.float64) - want)
  assert np.max(error) < 0.03 * np.max(np.abs(want))


@pytest.mark.parametrize(
  ('platform', 'operation'), [('cpu', 'while'), ('tpu', 'tpu_custom_call'), ('cuda', 'ragged_dot')]
)
def test_each_platform_has_its_form(platform, operation):
  *arguments, _ = inputs('7_tokens')
  traced = jax.jit(apply_experts).trace(*arguments)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert operation in text
  for other in {'tpu_custom_call', 'ragged_dot'} - {operation}:
    assert other not in text
