"""Schedules do every job once and in order; stages give what one microbatch after another gives."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.context import Context, packed_context
from deepseek_jax.layers.hyper_connections import HyperConnections
from deepseek_jax.layers.moe.router.noise import Gumbel
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.models.decoder import canonical, grouped, init_variables
from deepseek_jax.models.pipeline import GPipe, Interleaved, Stages
from deepseek_jax.models.plan import Segment
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import FSDP, PIPELINE

TOLERANCE = 1e-5

SCHEDULES = [
  (GPipe(microbatches=parts), count) for parts in (1, 2, 3, 8) for count in (1, 2, 4)
] + [
  (Interleaved(microbatches=parts, rounds=rounds), count)
  for parts in (1, 2, 3, 4, 5, 8)
  for rounds in (1, 2, 3)
  for count in (1, 2, 4)
]


@pytest.mark.parametrize(('schedule', 'count'), SCHEDULES)
def test_every_job_is_done_once_and_after_the_one_it_needs(schedule, count):
  """A stage gets what the one before it made in the tick before; nothing waits in between."""
  stages = Stages(schedule, count)
  done = {}
  for tick in range(stages.ticks):
    for stage in range(count):
      job = stages.job(np.asarray(tick - stage))
      assert 0 <= job.microbatch < schedule.microbatches
      if job.real:
        key = (int(job.microbatch), int(job.round), stage)
        assert key not in done
        done[key] = tick
  parts, rounds = schedule.microbatches, schedule.rounds
  assert len(done) == parts * rounds * count
  for (part, turn, stage), tick in done.items():
    if stage:
      assert done[part, turn, stage - 1] == tick - 1
    elif turn:
      assert done[part, turn - 1, count - 1] == tick - 1
  assert [done[part, rounds - 1, count - 1] for part in range(parts)] == [
    stages.finish(part) for part in range(parts)
  ]
  assert max(done.values()) == stages.ticks - 1
  idle = stages.ticks * count - len(done)
  assert stages.bubble_share == pytest.approx(idle / (stages.ticks * count))


def test_bubble_share():
  """The published formulas, where stages divide the microbatches; more where they do not."""
  assert Stages(GPipe(microbatches=8), 4).bubble_share == pytest.approx(3 / 11)
  assert Stages(Interleaved(microbatches=8, rounds=2), 4).bubble_share == pytest.approx(3 / 19)
  assert Stages(Interleaved(microbatches=8), 4).ticks == 19
  assert Stages(Interleaved(microbatches=9), 4).bubble_share > 3 / 21
  assert Stages(GPipe(microbatches=5), 1).bubble_share == 0


@dataclasses.dataclass(frozen=True)
class _Named:
  """A layer of which only the name counts."""

  name: str


def _plan(*parts: tuple[str, int]) -> tuple[Segment, ...]:
  return tuple(Segment(tuple(map(_Named, names)), repeats) for names, repeats in parts)


@pytest.mark.parametrize(
  ('plan', 'schedule', 'count', 'wanted'),
  [
    # V3: three dense layers and 58 with experts.
    ((('d', 3), ('m', 58)), GPipe(microbatches=1), 4, [('d', 3, 0), ('m', 56, 1), ('m', 2, 0)]),
    (
      (('d', 3), ('m', 58)),
      Interleaved(microbatches=1, rounds=3),
      4,
      [('d', 3, 0), *[('m', 16, 1)] * 3, ('m', 10, 0)],
    ),
    # V4: pairs stay together.
    (
      (('w', 2), ('c', 1), ('hc', 20)),
      GPipe(microbatches=1),
      4,
      [('w', 2, 0), ('c', 1, 0), ('hc', 20, 1)],
    ),
    # The longest run that divides; the first of equals.
    ((('a', 7), ('b', 4)), GPipe(microbatches=1), 4, [('a', 4, 1), ('a', 3, 0), ('b', 4, 0)]),
    ((('a', 7), ('bc', 3)), GPipe(microbatches=1), 3, [('a', 6, 1), ('a', 1, 0), ('bc', 3, 0)]),
    ((('a', 5), ('bc', 3)), GPipe(microbatches=1), 3, [('a', 5, 0), ('bc', 3, 1)]),
    ((('a', 5),), GPipe(microbatches=1), 1, [('a', 5, 1)]),
  ],
)
def test_one_run_of_layers_is_cut(plan, schedule, count, wanted):
  """Rounds become segments, so that every stage has neighbours in each; the rest follows."""
  found = Stages(schedule, count).cut(_plan(*plan))
  names = [''.join(layer.name for layer in part.pattern) for part in found]
  marks = [int(part.axis == 'stage') for part in found]
  assert list(zip(names, [part.repeats for part in found], marks, strict=True)) == wanted


def test_too_few_layers():
  """Says how many there are and how many it takes."""
  with pytest.raises(ConfigError, match=r'4 stages and 2 rounds .* 8 times in a row; .* 5 times'):
    Stages(Interleaved(microbatches=1), 4).cut(_plan(('ab', 2), ('c', 5)))


def test_counts_are_positive():
  """A pipeline of nothing is refused where it is written."""
  with pytest.raises(ConfigError, match='`microbatches` is 0'):
    GPipe(microbatches=0)
  with pytest.raises(ConfigError, match='`rounds` is 0'):
    Interleaved(microbatches=1, rounds=0)


def test_check_names_what_is_wrong():
  """Rules without stages, and rows that cannot be cut."""
  stages = Stages(GPipe(microbatches=3), 2)
  sizes = {'replica': 1, 'stage': 2, 'data': 2, 'seq': 1, 'expert': 2, 'model': 1}
  assert stages.check(sizes, PIPELINE, 12) == []
  rules, rows = stages.check(sizes, FSDP, 8)
  assert 'rules.stage is ()' in rules
  assert rows == '8 rows cannot be cut into 3 microbatches that 2 devices share'


@pytest.fixture(scope='module')
def evaluate(tiny, canonical_variables):
  """Returns hidden states, observations and gradients of one model, by canonical address."""
  # Two residual lanes, noise in the router, and a dense layer before.
  sparse = dataclasses.replace(tiny().feed_forward, router=Sigmoid(noise=Gumbel()))
  lanes = HyperConnections(lanes=2, iterations=2)
  variables = functools.cache(
    lambda depth: canonical_variables(tiny(depth=depth, residual=lanes, feed_forward=sparse))
  )
  rows = packed_context([(4, 3), (9,), (1, 1, 5), (8,), (2, 7), (), (6,), (3, 3, 3)], 9)
  # Among equal tokens attention is without effect, and its gradient nothing but rounding.
  tokens = jax.random.randint(jax.random.key(7), rows.tokens.shape, 0, 8)
  rows = dataclasses.replace(rows, tokens=tokens)

  @functools.cache
  def run(depth, schedule=None, mesh=None, noise=True):
    # Without a mesh, the layers are cut as for two stages, and run one after the other.
    count = 2 if mesh is None else mesh.stage
    stages = None if schedule is None else Stages(schedule, count)
    model = tiny(depth=depth, residual=lanes, feed_forward=sparse)
    decoder = model.build(stages=stages)
    given = {k: grouped(tree, decoder.segments) for k, tree in variables(depth).items()}
    context = dataclasses.replace(rows, rules=PIPELINE)
    return _evaluate(decoder, given, context, mesh, noise)

  return run


def _evaluate(decoder, variables, context: Context, mesh, noise):
  rngs = {'noise': jax.random.key(5)} if noise else {}

  def loss(params):
    (hidden, _), reported = decoder.apply(
      {**variables, 'params': params}, context, mutable=['losses', 'observed'], rngs=rngs
    )
    balance = sum(jnp.sum(x) for x in jax.tree.leaves(reported['losses']))
    total = jnp.sum(jnp.sin(hidden) * context.real[..., None]) + balance
    return total, (hidden, reported['losses'], reported['observed'])

  step = jax.jit(jax.grad(loss, has_aux=True))
  if mesh is None:
    grad, (hidden, losses, observed) = step(variables['params'])
  else:
    size = np.prod([size for size in dataclasses.asdict(mesh).values() if size])
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:size])):
      grad, (hidden, losses, observed) = step(variables['params'])
  trees = jax.device_get((losses, observed, grad))
  return np.asarray(hidden), *(canonical(tree, decoder.segments) for tree in trees)


def assert_equal(found, wanted):
  """Every array to 1e-5 of its norm, or of a thousandth of that of all arrays.

  Small arrays are sums of terms that cancel, which are themselves only known to so much.
  """
  whole = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(wanted)))
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for (path, b), a in zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(found)):
    name = jax.tree_util.keystr(path)
    # The loss knows no head.
    assert np.abs(b).max() > 0 or 'head' in name, name
    assert a.shape == b.shape, name
    limit = TOLERANCE * max(np.linalg.norm(b), 1e-3 * whole)
    assert np.linalg.norm(a - b) <= limit, name


SLOW = pytest.mark.slow
STAGES = [
  pytest.param(GPipe(microbatches=4), MeshConfig(stage=2, data=2), id='gpipe', marks=SLOW),
  pytest.param(
    Interleaved(microbatches=4), MeshConfig(stage=2, data=1), id='interleaved', marks=SLOW
  ),
  pytest.param(GPipe(microbatches=4), MeshConfig(stage=4, data=2), id='gpipe_4', marks=SLOW),
  pytest.param(Interleaved(microbatches=4), MeshConfig(data=1), id='rounds_alone', marks=SLOW),
]


@pytest.mark.parametrize(('schedule', 'mesh'), STAGES)
def test_stages_equal_one_microbatch_after_another(evaluate, schedule, mesh):
  """Lanes, packed rows, noise, and a dense layer before: the same numbers, whatever the stages.

  Noise belongs to a layer of the plan and a microbatch, whatever the stages.
  """
  found = evaluate(6, schedule, mesh)
  wanted = evaluate(6, schedule)
  for one, other in zip(found, wanted, strict=True):
    assert_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize('parts', [1, 2, 8])
def test_microbatches_change_nothing(evaluate, parts):
  """Without noise, microbatches one after another are the plain scan."""
  for one, other in zip(
    evaluate(6, GPipe(microbatches=parts), noise=False), evaluate(6, noise=False), strict=True
  ):
    assert_equal(one, other)


@pytest.mark.slow
def test_noise_is_drawn(evaluate):
  """The first test above is about noise: without it, loads are others."""
  loads = [
    evaluate(6, GPipe(microbatches=4), noise=noise)[2]['layers']['3']['feed_forward']['router']
    for noise in (True, False)
  ]
  assert np.abs(loads[0]['load'] - loads[1]['load']).max() > 0


def test_rows_that_microbatches_do_not_divide(tiny):
  """Refused when the model is called, too."""
  decoder = tiny().build(stages=Stages(GPipe(microbatches=3), 1))
  context = dataclasses.replace(packed_context([(2,), (2,)]), rules=PIPELINE)
  variables = jax.eval_shape(
    lambda key: nn.meta.unbox(init_variables(decoder, key)), jax.random.key(0)
  )
  with pytest.raises(ConfigError, match='2 rows cannot be cut into 3 microbatches'):
    jax.eval_shape(lambda variables: decoder.apply(variables, context), variables)
