"""Everything public says what it is, and everything that takes arrays says their shapes."""

import ast
import re

import pytest

SHAPED = ('ops', 'layers', 'models')
SIZE = r'(?:\.\.\.|…|\w+(?:\s*[-+−·×*/]+\s*\w+)*)'
SHAPE = re.compile(rf'\[(?:{SIZE}(?:,\s*{SIZE})*)?,?\](?!\()')
ARRAY = re.compile(r'\b(?:Array|ndarray|ArrayLike)\b')
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def public(tree, prefix='', *, method=False):
  """Yields (name, node, class it is in or None) of public classes, functions and methods."""
  owner = tree if method else None
  for node in tree.body:
    if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
      continue
    if node.name.startswith('_') and not (method and node.name == '__call__'):
      continue
    # Linen says what `setup` is for.
    if method and node.name == 'setup':
      continue
    yield prefix + node.name, node, owner
    if isinstance(node, ast.ClassDef):
      yield from public(node, f'{prefix}{node.name}.', method=True)


def overloaded(node):
  """Whether a function only repeats another: an overload, a setter, a marked override."""
  words = [ast.unparse(d) for d in getattr(node, 'decorator_list', [])]
  return any(w.endswith(('overload', 'override', '.setter', '.register')) for w in words)


def missing_docstrings(source):
  """Lists what is public and says nothing."""
  faults = []
  if not (ast.get_docstring(source.tree) or '').strip():
    faults.append(f'{source.path}: the module has no docstring')
  for name, node, _ in public(source.tree):
    if not (ast.get_docstring(node) or '').strip() and not overloaded(node):
      faults.append(f'{source.path}:{node.lineno}: `{name}` has no docstring')
  return faults


def takes_arrays(node):
  """Whether a function has a parameter annotated as an array, or a container of arrays.

  A random key is an array by type only.
  """
  arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
  annotations = [a.annotation for a in arguments if a.annotation and a.arg not in ('key', 'keys')]
  return any(ARRAY.search(ast.unparse(annotation)) for annotation in annotations)


def missing_shapes(source):
  """Lists functions that take arrays and give no shape in brackets: `[B, T, D]`, `[N]`, `[]`.

  A method may leave it to the docstring of its class, or of the module.
  """
  if source.package not in SHAPED:
    return []
  faults = []
  for name, node, owner in public(source.tree):
    if not isinstance(node, FUNCTIONS) or not takes_arrays(node):
      continue
    texts = [ast.get_docstring(n) or '' for n in (node, owner) if n is not None]
    if not any(SHAPE.search(text) for text in texts) and not overloaded(node):
      faults.append(f'{source.path}:{node.lineno}: `{name}` takes arrays of unknown shape')
  return faults


def test_everything_public_has_a_docstring(sources):
  """Modules, classes, functions and methods of the package."""
  faults = [fault for source in sources('deepseek_jax') for fault in missing_docstrings(source)]
  assert not faults, '\n'.join(faults)


def test_scripts_and_configs_say_what_they_are_for(all_sources):
  """At the top of each file."""
  tops = ('configs/', 'experiments/', 'scripts/', 'tests/', 'setup.py')
  chosen = [source for source in all_sources if source.path.startswith(tops)]
  faults = [s.path for s in chosen if not (ast.get_docstring(s.tree) or '').strip()]
  assert not faults, '\n'.join(faults)


def test_functions_of_arrays_give_shapes(sources):
  """In `ops`, `layers` and `models`."""
  chosen = [source for source in sources('deepseek_jax') if source.package in SHAPED]
  assert sum(takes_arrays(n) for s in chosen for n in ast.walk(s.tree) if isinstance(n, FUNCTIONS))
  faults = [fault for source in chosen for fault in missing_shapes(source)]
  assert not faults, '\n'.join(faults)


@pytest.mark.parametrize(
  ('text', 'faults'),
  [
    ('x = 1', 1),
    ('"""Says."""\ndef f(): ...', 1),
    ('"""Says."""\nasync def f(): ...', 1),
    ('"""Says."""\nclass A: ...', 1),
    ('"""Says."""\nclass A:\n  """ """\n  def f(self): ...', 2),
    ('"""Says."""\nclass A:\n  """Says."""\n  def __call__(self, x): ...', 1),
    ('"""Says."""\nclass A:\n  """Says."""\n  class B:\n    def f(self): ...', 2),
    ('"""Says."""\ndef _f(): ...\nclass _A:\n  def f(self): ...', 0),
    ('"""Says."""\nclass A:\n  """Says."""\n  def __post_init__(self): ...', 0),
    ('"""Says."""\ndef f():\n  """Says."""\n  def g(): ...', 0),
    ('"""Says."""\nclass A:\n  """Says."""\n  def setup(self): ...', 0),
    ('"""Says."""\ndef setup(): ...', 1),
    ('"""Says."""\n@typing.overload\ndef f(): ...', 0),
  ],
)
def test_silence_is_noticed(parse, text, faults):
  """Public things count, private and nested ones do not."""
  assert len(missing_docstrings(parse('deepseek_jax/a.py', text))) == faults


@pytest.mark.parametrize(
  ('parameter', 'docstring', 'faults'),
  [
    ('x: jax.Array', 'Adds.', 1),
    ('x: dict[str, jax.Array]', 'Adds [what it must](there).', 1),
    ('*, x: jnp.ndarray | None', 'Adds.', 1),
    ('x: jax.Array', 'Adds to x [B, T, D].', 0),
    ('x: jax.Array', 'Adds to x [..., D].', 0),
    ('x: Array', 'Adds to x [].', 0),
    ('x: Array', 'Adds to x [N].', 0),
    ('x: Array', 'Adds to x [dim / 2, 2·R].', 0),
    ('x: int', 'Adds.', 0),
    ('key: jax.Array', 'Adds.', 0),
    ('x: Arrays', 'Adds.', 0),
  ],
)
def test_unknown_shapes_are_noticed(parse, parameter, docstring, faults):
  """In a function, and in a method whose class does not give the shape either."""
  text = f'"""Says."""\ndef f({parameter}):\n  """{docstring}"""\n'
  assert len(missing_shapes(parse('deepseek_jax/ops/a.py', text))) == faults
  assert not missing_shapes(parse('deepseek_jax/train/a.py', text))
  indented = text.split('\n', 1)[1].replace('def', '  def').replace('  """', '    """')
  indented = indented.replace('f(', 'f(self, ')
  silent = f'"""Says."""\nclass A:\n  """Says."""\n{indented}'
  assert len(missing_shapes(parse('deepseek_jax/layers/a.py', silent))) == faults
  shaped = f'"""Says."""\nclass A:\n  """From [B, T, D] to [B, T, D]."""\n{indented}'
  assert not missing_shapes(parse('deepseek_jax/layers/a.py', shaped))
