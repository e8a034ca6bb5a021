"""The table of rules raises where Linen's own says nothing."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.weights import Labelled
from deepseek_jax.sharding import rules as table
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.presets import EXPERT, FSDP, TENSOR
from deepseek_jax.sharding.rules import Rules

TABLE = Rules(batch=('replica', 'data'), embed=('data',), heads=('model',), vocab=('model',))


def test_spec():
  """One mesh axis stays a word, several a tuple, none is None; no entry is dropped."""
  assert tuple(TABLE.spec(('batch', 'seq', None))) == (
    ('replica', 'data'),
    None,
    None,
  )
  assert tuple(TABLE.spec(('embed', 'heads', None))) == ('data', 'model', None)
  assert tuple(TABLE.spec(())) == ()


def test_misspelt_logical_axis():
  """The error holds the word, its neighbours and the near match."""
  with pytest.raises(ConfigError, match=r"`haeds` of \('embed', 'haeds'\): did you mean `heads`\?"):
    TABLE.spec(('embed', 'haeds'))
  with pytest.raises(ConfigError, match=r'`zzz` of .*known are batch, seq, act_embed'):
    TABLE.spec(('zzz',))


def test_misspelt_mesh_axis():
  """Every misspelt mesh axis of a table is listed when the table is made."""
  with pytest.raises(ConfigError) as caught:
    Rules(embed=('dta',), heads=('modell', 'data'), mlp=('qqq',))
  assert caught.value.messages == (
    '`embed` maps to `dta`; did you mean `data`?',
    '`heads` maps to `modell`; did you mean `model`?',
    '`mlp` maps to `qqq`; known are replica, stage, data, seq, expert, model',
  )


def test_a_word_is_no_tuple_of_letters():
  """`embed='data'` is a likely slip; it must not be read as four axes."""
  with pytest.raises(ConfigError, match=r"`embed` is 'data'; expected a tuple.*\('data',\)"):
    Rules(embed='data')


def test_colliding_axes():
  """Two axes of one array cannot lie on one mesh axis; both are named."""
  with pytest.raises(ConfigError, match=r'`heads` and `vocab` both claim mesh axis `model`'):
    TABLE.spec(('heads', 'vocab'))
  with pytest.raises(ConfigError, match=r'`batch` and `embed` both claim mesh axis `data`'):
    TABLE.spec(('batch', 'embed'))
  with pytest.raises(ConfigError, match=r'`embed` and `embed` both claim'):
    TABLE.spec(('embed', 'embed'))


class Misnamed(nn.Module):
  """A layer labelled with Linen's own means, as ours are not."""

  axes: tuple[str, ...]

  @nn.compact
  def __call__(self):
    """Declares one weight [8, 8]."""
    init = nn.with_logical_partitioning(nn.initializers.ones, self.axes)
    return self.param('weight', init, (8, 8))


@pytest.mark.parametrize(
  ('axes', 'linen', 'message'),
  [
    (('embed', 'haeds'), P('data', None), 'did you mean `heads`'),
    (('heads', 'vocab'), P('model', None), '`heads` and `vocab` both claim'),
  ],
)
def test_what_linen_does_in_silence(axes, linen, message):
  """Linen replicates the misspelt axis and drops the second of two colliding ones; ours raise."""
  variables = jax.eval_shape(Misnamed(axes).init, jax.random.key(0))
  linen_rules = [('embed', 'data'), ('heads', 'model'), ('vocab', 'model')]
  silent = nn.logical_to_mesh(nn.get_partition_spec(variables), linen_rules)
  assert silent['params']['weight'] == linen
  with pytest.raises(ConfigError, match=f'params/weight: .*{message}'):
    table.tree_specs(TABLE, table.logical_axes(variables))


def test_explicit_axes_break_linen():
  """The other trap: under JAX's default mesh a labelled Linen weight cannot be opened."""
  boxed = nn.Partitioned(jnp.ones((8, 8)), names=('data', None))
  explicit = jax.make_mesh((8,), ('data',))
  with jax.set_mesh(explicit), pytest.raises((AssertionError, ValueError)):
    jax.jit(lambda: boxed.unbox())()
  # Ours opens under any mesh, also where its names are no mesh axes.
  ours = Labelled(jnp.ones((8, 8)), names=('embed', 'heads'))
  for mesh in (explicit, make_mesh(MeshConfig())):
    with jax.set_mesh(mesh):
      assert jax.jit(lambda: ours.unbox())().shape == (8, 8)


def test_constrain_without_a_mesh():
  """Where there is nothing to lay out, rank, names and collisions are checked all the same."""
  x = jnp.ones((2, 3))
  assert TABLE.constrain(x, ('batch', 'seq')) is x
  with pytest.raises(ConfigError, match=r'1 axis names .* for an array of rank 2'):
    TABLE.constrain(x, ('batch',))
  with pytest.raises(ConfigError, match=r'did you mean `seq`'):
    TABLE.constrain(x, ('batch', 'sep'))
  with pytest.raises(ConfigError, match=r'both claim'):
    TABLE.constrain(x, ('heads', 'vocab'))


def test_constrain_on_a_mesh():
  """The array comes out in the pieces that the table says."""
  mesh = make_mesh(MeshConfig(data=2, model=4))
  with jax.set_mesh(mesh):
    y = jax.jit(lambda x: TABLE.constrain(x, ('batch', 'heads')))(jnp.ones((4, 8)))
    with pytest.raises(ConfigError, match=r'rank 2'):
      jax.jit(lambda x: TABLE.constrain(x, ('batch', 'heads', None)))(jnp.ones((4, 8)))
  assert {shard.data.shape for shard in y.addressable_shards} == {(2, 2)}


def test_logical_axes():
  """Labels become tuples; what has none is whole on every device."""
  tree = {'a': Labelled(jnp.ones((2, 3)), names=('embed', None)), 'b': jnp.ones((2, 3, 4))}
  assert table.logical_axes(tree) == {'a': ('embed', None), 'b': (None, None, None)}


def test_tree_specs_name_the_address():
  """An error in a tree says which array it is about."""
  axes = {'layers': {'query': ('embed', 'heads'), 'key': ('embed', 'embed')}}
  with pytest.raises(ConfigError, match=r'^layers/key: axes'):
    table.tree_specs(TABLE, axes)
  axes['layers'].pop('key')
  specs = table.tree_specs(TABLE, axes)
  assert specs == {'layers': {'query': P('data', 'model')}}
  mesh = make_mesh(MeshConfig(model=2))
  assert table.tree_shardings(mesh, specs) == {
    'layers': {'query': NamedSharding(mesh, P('data', 'model'))}
  }


def test_shard_count():
  """Pieces along one axis of an array."""
  sizes = MeshConfig(replica=2, data=4).sizes(8)
  assert table.shard_count(None, sizes) == 1
  assert table.shard_count('data', sizes) == 4
  assert table.shard_count(('replica', 'data'), sizes) == 8


def test_check_divisible():
  """Each axis that does not divide is listed with its address; the others are not."""
  sizes = MeshConfig(data=2, model=4).sizes(8)
  shapes = {
    'good': jax.ShapeDtypeStruct((6, 8), jnp.float32),
    'bad': {'both': jax.ShapeDtypeStruct((7, 6), jnp.float32)},
  }
  specs = {'good': P('data', 'model'), 'bad': {'both': P('data', 'model')}}
  assert table.check_divisible(shapes, specs, sizes) == [
    "bad/both: axis 0 of shape (7, 6) is not divisible by the 2 devices of mesh axis 'data'",
    "bad/both: axis 1 of shape (7, 6) is not divisible by the 4 devices of mesh axis 'model'",
  ]
  with pytest.raises(ValueError, match=r'zip\(\) argument 2 is shorter'):
    table.check_divisible(shapes, {'good': P('data', 'model')}, sizes)


@pytest.mark.parametrize('preset', [FSDP, TENSOR, EXPERT])
def test_presets_cut_what_they_say(preset):
  """A dense and an expert matrix, in pieces counted by hand."""
  mesh = make_mesh(MeshConfig(data=2, expert=2, model=2))
  pieces = {}
  for name, axes in (
    ('dense', ('embed', 'mlp')),
    ('expert', ('expert', 'expert_embed', 'expert_mlp')),
    ('batch', ('batch', 'seq')),
  ):
    shape = (8,) * len(axes)
    sharding = NamedSharding(mesh, preset.spec(axes))
    pieces[name] = jax.device_put(np.zeros(shape), sharding).addressable_shards[0].data.shape
  expected = {
    id(FSDP): {'dense': (4, 8), 'expert': (8, 4, 8), 'batch': (4, 8)},
    id(TENSOR): {'dense': (4, 4), 'expert': (8, 4, 4), 'batch': (4, 8)},
    id(EXPERT): {'dense': (4, 8), 'expert': (4, 4, 8), 'batch': (2, 8)},
  }
  assert pieces == expected[id(preset)]


def test_presets_are_frozen_and_hashable():
  """Rules are static arguments of jitted functions."""
  assert len({FSDP, TENSOR, EXPERT, dataclasses.replace(FSDP)}) == 3


def test_an_axis_that_is_dealt_with():
  """Nothing lies along it any more; the rest stays."""
  rules = Rules(batch=('replica', 'data'), seq=('replica',), embed=('data',))
  assert rules.without('replica') == Rules(batch=('data',), embed=('data',))
  assert rules.without('model') == rules
