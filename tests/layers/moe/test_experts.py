"""What experts are made of: a shared matrix and low-rank parts against matrices of their own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart, tiny_mla
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override, override_from_text
from deepseek_jax.core.tree import bytes_of, count, flatten
from deepseek_jax.layers.context import text_context
from deepseek_jax.layers.moe.experts import Separate, SharedFactor
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.cost import active_parameters, forward_flops, making_flops
from deepseek_jax.models.decoder import canonical, init_variables, plan_segments
from deepseek_jax.ops.expert_rows import MATRICES
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import EXPERT, TENSOR
from deepseek_jax.train.step import build_program
from deepseek_jax.train.summary import describe_cost, experiment_weights, step_flops

E, D, F, R = 5, 6, 4, 2


class Matrices(nn.Module):
  """The matrices of a form and nothing else."""

  form: Separate | SharedFactor
  sizes: tuple[int, int, int]

  @nn.compact
  def __call__(self, dtype):
    """Returns gate, up and down."""
    return self.form.matrices(self, *self.sizes, dtype)


def make(form, sizes=(E, D, F)):
  module = Matrices(form, sizes)
  init = jax.jit(lambda key: module.init(key, jnp.float32))
  return module, nn.meta.unbox(init(jax.random.key(0)))['params']


def shapes(form, sizes):
  init = lambda key: Matrices(form, sizes).init(key, jnp.float32)  # noqa: E731
  return nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))['params']


def test_shared_factor_is_shared_plus_a_product():
  module, params = make(SharedFactor(rank=R))
  assert {name: leaf.shape for name, leaf in params.items()} == {
    **{f'{name}_shared': (D, F) for name in ('gate', 'up')},
    **{f'{name}_in': (E, D, R) for name in ('gate', 'up')},
    **{f'{name}_out': (E, R, F) for name in ('gate', 'up')},
    'down_shared': (F, D),
    'down_in': (E, F, R),
    'down_out': (E, R, D),
  }
  made = module.apply({'params': params}, jnp.float32)
  p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
  for name in ('gate', 'up', 'down'):
    want = [p[f'{name}_shared'] + p[f'{name}_in'][e] @ p[f'{name}_out'][e] for e in range(E)]
    np.testing.assert_allclose(getattr(made, name), want, atol=1e-6)
  assert module.apply({'params': params}, jnp.bfloat16).up.dtype == jnp.bfloat16


def test_fresh_experts_are_as_large_as_separate_ones_and_differ():
  sizes = (16, 96, 64)
  _, separate = make(Separate(), sizes)
  for own in (0.25, 0.5):
    module, params = make(SharedFactor(rank=8, own=own), sizes)
    made = module.apply({'params': params}, jnp.float32)
    for name in ('gate', 'up', 'down'):
      w, reference = getattr(made, name), separate[name]
      assert w.shape == reference.shape
      assert float(jnp.var(w)) == pytest.approx(float(jnp.var(reference)), rel=0.06)
      mean = jnp.mean(w, axis=0)
      apart = float(jnp.mean((w - mean) ** 2)) * 16 / 15 / float(jnp.var(w))
      assert apart == pytest.approx(own, rel=0.15)


def test_gradients_are_those_of_the_product():
  module, params = make(SharedFactor(rank=R))
  rng = np.random.default_rng(0)
  back = [rng.standard_normal((E, *s)).astype(np.float32) for s in ((D, F), (D, F), (F, D))]

  @jax.jit
  def grads(params):
    def total(params):
      made = module.apply({'params': params}, jnp.float32)
      return sum(jnp.sum(w * b) for w, b in zip(made, back, strict=True))

    return jax.grad(total)(params)

  found = grads(params)
  for name, b in zip(('gate', 'up', 'down'), back, strict=True):
    a, c = np.asarray(params[f'{name}_in']), np.asarray(params[f'{name}_out'])
    np.testing.assert_allclose(found[f'{name}_shared'], b.sum(axis=0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[f'{name}_in'], b @ c.swapaxes(1, 2), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[f'{name}_out'], a.swapaxes(1, 2) @ b, rtol=1e-4, atol=1e-5)
  # One expert's factor that is not finite: that expert's matrix says so, and no gradient does.
  broken = {**params, 'up_in': params['up_in'].at[3, 0, 1].set(np.nan)}
  made = module.apply({'params': broken}, jnp.float32)
  assert np.isnan(made.up[3]).all()
  assert np.isfinite(np.delete(made.up, 3, axis=0)).all()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads(broken)))


def test_bytes_against_separate():
  """At quickstart's sizes: rank 27 keeps 41.4 % of the bytes, and rank 28 passes 42 %."""
  moe = quickstart.get_config().model.feed_forward
  sizes = (moe.experts, quickstart.get_config().model.width, moe.hidden)
  experts, width, hidden = sizes
  separate = shapes(Separate(), sizes)
  for rank, saved in ((27, 0.586), (28, 0.573)):
    params = shapes(SharedFactor(rank=rank), sizes)
    assert count(params) == 3 * (width * hidden + experts * rank * (width + hidden))
    assert 1 - bytes_of(params) / bytes_of(separate) == pytest.approx(saved, abs=5e-4)


def test_the_layer_with_shared_factors_is_the_layer_with_their_sums():
  """Forward, and the gradient of what goes in."""
  plain = MoE(experts=E, top_k=2, hidden=F, form=Separate())
  factored = MoE(experts=E, top_k=2, hidden=F, form=SharedFactor(rank=R))
  x = np.random.default_rng(0).standard_normal((2, 7, D)).astype(np.float32)
  context = text_context(jnp.zeros((2, 7), jnp.int32))
  module = factored.build()
  variables = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), x, context))
  form, sizes = factored.form, (E, D, F)
  own = {k: v for k, v in variables['params'].items() if k not in ('router', 'shared')}
  made = Matrices(form, sizes).apply({'params': own}, jnp.float32)
  rest = {k: variables['params'][k] for k in ('router', 'shared')}
  summed = {**variables, 'params': {**rest, **dict(zip(MATRICES, made, strict=True))}}

  def both(layer, variables):
    def run(x):
      return jnp.sum(jnp.sin(layer.build().apply(variables, x, context)))

    return jax.jit(jax.value_and_grad(run))(x)

  (value, grad), (want, want_grad) = both(factored, variables), both(plain, summed)
  assert float(value) == pytest.approx(float(want), rel=1e-5)
  np.testing.assert_allclose(grad, want_grad, atol=1e-5)


def experiment(form, **changes):
  return override(
    tiny_mla.get_config(), {'model.feed_forward.form': form, 'model.mtp': None, **changes}
  )[0]


def test_costs_are_counted_as_they_are():
  """The shared matrix is one parameter met, multiplied with in every expert; making is a step's."""
  plain, factored = (
    build_program(experiment(form), jax.devices()[:1])
    for form in (Separate(), SharedFactor(rank=3))
  )
  config = factored.experiment
  width, moe, sparse = 32, config.model.feed_forward, 2
  ours, theirs = experiment_weights(factored), experiment_weights(plain)
  matrix = width * moe.hidden
  own = 3 * (width + moe.hidden)
  kept = 3 * sparse * moe.top_k * matrix
  assert active_parameters(theirs) - kept + 3 * sparse * (matrix + moe.top_k * own) == (
    active_parameters(ours)
  )
  flops = [forward_flops(config.model, weights, 64) for weights in (ours, theirs)]
  assert flops[0] == flops[1]
  making = 3 * sparse * moe.experts * matrix * (2 * 3 + 1)
  assert making_flops(config.model) == making
  assert making_flops(plain.experiment.model) == 0
  steps = step_flops(config, ours) - step_flops(plain.experiment, theirs)
  np.testing.assert_array_equal(steps, 3 * making)
  assert "making the experts' matrices" in describe_cost(config, ours)
  assert "making the experts' matrices" not in describe_cost(plain.experiment, theirs)


def test_factors_have_a_place_on_every_mesh():
  """Experts over `expert`, hidden units over `model`: the factors lie where their sum does."""
  devices = {'expert': MeshConfig(data=2, expert=4), 'model': MeshConfig(data=2, model=4)}
  found = {}
  for (name, mesh), rules in zip(devices.items(), (EXPERT, TENSOR), strict=True):
    program = build_program(experiment(SharedFactor(rank=3), rules=rules, mesh=mesh))
    flat = flatten(program.abstract_state.params)
    prefix = 'stack/segment_1/block_0/feed_forward'
    found[name] = {
      leaf: tuple(flat[f'{prefix}/{leaf}'].sharding.spec)
      for leaf in ('gate_shared', 'gate_in', 'gate_out', 'down_out')
    }
  assert found['expert'] == {
    'gate_shared': (None, 'data', None),
    'gate_in': (None, 'expert', 'data', None),
    'gate_out': (None, 'expert', None, None),
    'down_out': (None, 'expert', None, 'data'),
  }
  assert found['model'] == {
    'gate_shared': (None, 'data', 'model'),
    'gate_in': (None, None, 'data', None),
    'gate_out': (None, None, None, 'model'),
    'down_out': (None, None, None, 'data'),
  }


def test_one_line_and_canonical_addresses():
  """The form is a word on the command line; weights other than the experts' keep their address."""
  text = {'model.feed_forward.form': 'SharedFactor(rank=3)'}
  config, _ = override_from_text(tiny_mla.get_config(), text)
  assert config.model.feed_forward.form == SharedFactor(rank=3)
  found = []
  for model in (tiny_mla.get_config().model, config.model):
    decoder = model.build()
    boxed = jax.eval_shape(lambda k, d=decoder: init_variables(d, k), jax.random.key(0))
    params = nn.meta.unbox(boxed)['params']
    found.append({a: x.shape for a, x in flatten(canonical(params, plan_segments(model))).items()})
  old, new = found
  fresh = {address for address in new if old.get(address) != new[address]}
  parts = {f'{m}_{p}' for m in ('gate', 'up', 'down') for p in ('shared', 'in', 'out')}
  places = ('layers/1', 'layers/2', 'mtp_0/block')
  assert fresh == {f'{place}/feed_forward/{part}' for place in places for part in parts}
  assert old.keys() - new.keys() == {
    f'{place}/feed_forward/{name}' for place in places for name in ('gate', 'up', 'down')
  }


@pytest.mark.parametrize('fields', [{'rank': 0}, {'rank': 1, 'own': 0.0}, {'rank': 1, 'own': 1.0}])
def test_wrong_fields(fields):
  with pytest.raises(ConfigError):
    SharedFactor(**fields)
