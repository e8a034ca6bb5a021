"""The narrow subset of Flax Linen that the package uses."""

import ast

import pytest

# Wrapping functions, declaring weights and labelling their axes; no ready layer is among them.
ALLOWED = {
  'Module',
  'Partitioned',
  'PARTITION_NAME',
  'broadcast',
  'compact',
  'get_partition_spec',
  'initializers',
  'map_variables',
  'meta',
  'nowrap',
  'remat',
  'scan',
  'unbox',
  'with_partitioning',
}
BANNED_NAMES = {
  'sow': 'return values, or use `observe` and `add_loss`',
  'share_scope': 'pass the module instead',
  'logical_axis_rules': 'translation of axis names is `sharding`s, which raises on a misspelt one',
  'with_logical_constraint': 'use the constraint of `sharding`, which raises on a misspelt axis',
  'with_logical_partitioning': 'declare weights in layers/weights.py',
  'set_logical_axis_rules': 'translation of axis names is `sharding`s',
}
WEIGHTS = 'deepseek_jax/layers/weights.py'
# Looking inside from outside: models stay free of what only a reader wants of them.
ONLY_IN = {'intercept_methods': 'deepseek_jax/lab/walk.py'}


def linen_names(tree):
  """Yields (line, dotted name after `flax.linen`) of every use of Linen in a file."""
  aliases = {'flax.linen'}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      aliases |= {a.asname for a in node.names if a.name == 'flax.linen' and a.asname}
      for alias in node.names:
        if alias.name.startswith('flax.linen.'):
          yield node.lineno, alias.name.removeprefix('flax.linen.')
    elif isinstance(node, ast.ImportFrom) and node.module == 'flax':
      aliases |= {a.asname or a.name for a in node.names if a.name == 'linen'}
    elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('flax.linen'):
      inner = node.module.removeprefix('flax.linen').removeprefix('.')
      for alias in node.names:
        yield node.lineno, f'{inner}.{alias.name}' if inner else alias.name
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases:
      yield node.lineno, node.attr


def identifiers(tree):
  """Yields (line, name) of every name, attribute and imported name."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Name):
      yield node.lineno, node.id
    elif isinstance(node, ast.Attribute):
      yield node.lineno, node.attr
    elif isinstance(node, ast.Import | ast.ImportFrom):
      for alias in node.names:
        yield node.lineno, alias.name.rpartition('.')[2]


def call_faults(node, path):
  """Yields what is wrong with one call."""
  name = ast.unparse(node.func).rpartition('.')[2]
  method = isinstance(node.func, ast.Attribute)
  strings = {n.value for a in node.args[:1] for n in ast.walk(a) if isinstance(n, ast.Constant)}
  if method and name == 'param' and path != WEIGHTS:
    yield 'weights are declared in layers/weights.py alone'
  if method and name in ('variable', 'put_variable') and 'cache' in strings:
    yield 'a cache is an argument and a result, not a collection'
  for keyword in node.keywords:
    inside = {n.value for n in ast.walk(keyword.value) if isinstance(n, ast.Constant)}
    if keyword.arg == 'mutable' and 'cache' in inside:
      yield 'a cache is an argument and a result, not a collection'
    # Also through `functools.partial(jax.shard_map, mesh=…)`.
    mapped = name == 'shard_map' or (
      name == 'partial' and node.args and ast.unparse(node.args[0]).endswith('shard_map')
    )
    if keyword.arg == 'mesh' and mapped:
      yield '`shard_map` takes the mesh that is set: one that is named does not nest'
  if name == 'shard_map' and len(node.args) > 1:
    yield '`shard_map` takes the mesh that is set: one that is named does not nest'


def linen_faults(source):
  """Lists everything in a file that is outside the subset."""
  tree, faults = source.tree, []
  for line, name in linen_names(tree):
    if ONLY_IN.get(name) == source.path:
      continue
    if name.split('.')[0] not in ALLOWED:
      faults.append((line, f'`flax.linen.{name}` is outside the subset we use'))
  for line, name in identifiers(tree):
    if name in BANNED_NAMES:
      faults.append((line, f'`{name}`: {BANNED_NAMES[name]}'))
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      faults += [(node.lineno, fault) for fault in call_faults(node, source.path)]
    names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
    if isinstance(node, ast.ImportFrom):
      names = [f'{node.module}.{name}' for name in names]
    if any((name + '.').startswith('flax.nnx.') for name in names):
      faults.append((node.lineno, 'modules are Linen; two module systems do not mix'))
  return [f'{source.path}:{line}: {fault}' for line, fault in faults]


def test_only_the_narrow_subset_is_used(all_sources):
  """Everywhere but in tests, which may compare with what is banned."""
  ours = [source for source in all_sources if not source.path.startswith('tests/')]
  faults = [fault for source in ours for fault in linen_faults(source)]
  assert not faults, '\n'.join(faults)


def test_weights_are_where_the_rule_says(sources):
  """The exception in the rule is a file that exists and declares weights."""
  (weights,) = [source for source in sources('deepseek_jax') if source.path == WEIGHTS]
  assert '.param(' in weights.text


@pytest.mark.parametrize(
  'text',
  [
    'import flax.linen as nn\nnn.Dense(3)',
    'import flax.linen as nn\nnn.jit(f)',
    'import flax.linen as nn\nnn.softmax(x)',
    'import flax\nflax.linen.Embed(3, 4)',
    'from flax import linen\nlinen.RMSNorm()',
    'from flax import linen as fl\nfl.vmap(f)',
    'from flax.linen import LayerNorm',
    'from flax.linen.partitioning import axis_rules',
    'import flax.linen.attention',
    'from flax import nnx',
    'import flax.nnx.spmd',
    'self.sow("losses", "balance", 1.0)',
    'share_scope(a, b)',
    'with logical_axis_rules(rules): pass',
    'x = with_logical_constraint(x, names)',
    'module.apply(v, x, mutable=["cache"])',
    'module.apply(v, x, mutable=("losses", "cache"))',
    'module.apply(v, x, mutable="cache")',
    'self.variable("cache", "key", f)',
    'self.param("kernel", init, (2, 3))',
    'jax.shard_map(f, mesh=mesh, in_specs=s, out_specs=s)',
    'jax.shard_map(f, mesh, s, s)',
    'functools.partial(jax.shard_map, mesh=mesh, in_specs=s)',
    '@partial(shard_map, mesh=mesh)\ndef f(x): ...',
  ],
)
def test_what_is_banned_is_noticed(parse, text):
  """One fault each."""
  assert len(linen_faults(parse('deepseek_jax/layers/a.py', text))) == 1


@pytest.mark.parametrize(
  'text',
  [
    'import flax.linen as nn\nclass A(nn.Module):\n  @nn.compact\n  def f(self): ...',
    'import flax.linen as nn\nnn.scan(nn.remat(f))\nnn.initializers.normal(1.0)',
    'from jax import nn\nnn.softmax(x)',
    'import jax\njax.nn.silu(x)',
    'jax.shard_map(f, axis_names={"expert"}, in_specs=s, out_specs=s)',
    'NamedSharding(mesh=mesh, spec=s)',
    'module.apply(v, x, mutable=["losses", "observed"])',
    'self.variable("buffers", "bias", f)',
    'empty_cache(cache="cache")',
  ],
)
def test_what_is_allowed_passes(parse, text):
  """The checker is not merely strict."""
  assert linen_faults(parse('deepseek_jax/layers/a.py', text)) == []


def test_weights_file_may_declare_weights(parse):
  """There and nowhere else."""
  text = 'module.param("kernel", init, (2, 3))'
  assert linen_faults(parse(WEIGHTS, text)) == []
  assert linen_faults(parse('deepseek_jax/layers/moe/weights.py', text))
