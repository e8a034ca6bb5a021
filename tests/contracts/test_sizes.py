"""Ceilings on the size of files, functions, signatures and configs."""

import ast
import re

import pytest

FILE_LINES = 400
FUNCTION_LINES = 60
PARAMETERS = 8
FIELDS = 15
# One table of axis names and one description of a run: they are long because the world is.
LONG_CONFIGS = ('Rules', 'Experiment')
NO_FIELD = re.compile(r'\b(ClassVar|KW_ONLY)\b')
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def exempt_by_rule(source):
  """Kernels are written for a machine, not for a reader."""
  return source.path.startswith('deepseek_jax/ops/kernels/')


def long_files(name, text):
  """Yields the place and fault of a file over the ceiling."""
  lines = len(text.splitlines())
  if lines > FILE_LINES:
    yield name, f'{lines} lines, at most {FILE_LINES}'


def functions(tree, prefix=''):
  """Yields (qualified name, node, whether a method) of every function, nested ones too."""
  for node in ast.iter_child_nodes(tree):
    named = isinstance(node, (*FUNCTIONS, ast.ClassDef))
    name = f'{prefix}{node.name}' if named else ''
    if isinstance(node, FUNCTIONS):
      yield name, node, isinstance(tree, ast.ClassDef)
    yield from functions(node, f'{name}.' if named else prefix)


def long_functions(source):
  """Yields functions over the ceiling; their docstrings do not count, so nobody saves on them."""
  for name, node, _ in functions(source.tree):
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
      lines -= node.body[0].end_lineno - node.body[0].lineno + 1
    if lines > FUNCTION_LINES:
      yield f'{source.path}::{name}', f'{lines} lines, at most {FUNCTION_LINES}'


def long_signatures(source):
  """Yields functions with too many parameters, `self` and `cls` not counted."""
  for name, node, method in functions(source.tree):
    arguments = node.args
    static = any(ast.unparse(d) == 'staticmethod' for d in node.decorator_list)
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    names = names[1:] if method and not static else names
    names += [a.arg for a in (*arguments.kwonlyargs, arguments.vararg, arguments.kwarg) if a]
    if len(names) > PARAMETERS:
      yield f'{source.path}::{name}', f'{len(names)} parameters, at most {PARAMETERS}'


def fields(node, classes):
  """Names of a dataclass's fields, with those of bases in the same file."""
  found = {}
  for base in node.bases:
    if ast.unparse(base) in classes:
      found |= dict.fromkeys(fields(classes[ast.unparse(base)], classes))
  for item in node.body:
    if isinstance(item, ast.AnnAssign) and not NO_FIELD.search(ast.unparse(item.annotation)):
      found[ast.unparse(item.target)] = None
  return list(found)


def is_dataclass(node):
  """Whether a class is decorated as `dataclasses.dataclass`, `struct.dataclass` or the like."""
  return any('dataclass' in ast.unparse(decorator) for decorator in node.decorator_list)


def long_configs(source):
  """Yields dataclasses with too many fields."""
  classes = {n.name: n for n in ast.walk(source.tree) if isinstance(n, ast.ClassDef)}
  for name, node in classes.items():
    count = len(fields(node, classes))
    if is_dataclass(node) and name not in LONG_CONFIGS and count > FIELDS:
      yield f'{source.path}::{name}', f'{count} fields, at most {FIELDS}'


def violations(check, all_sources):
  """All that a checker finds in code that no rule exempts."""
  return [v for source in all_sources if not exempt_by_rule(source) for v in check(source)]


def test_files_are_short(all_sources, repository_files, settle, root):
  """Python and shell files."""
  found = violations(lambda source: long_files(source.path, source.text), all_sources)
  for path in repository_files:
    if path.suffix == '.sh':
      found += long_files(path.relative_to(root).as_posix(), path.read_text(encoding='utf-8'))
  settle('file length', found)


def test_functions_are_short(all_sources, settle):
  """Lines of code, comments included, docstrings not."""
  settle('function length', violations(long_functions, all_sources))


def test_signatures_are_short(all_sources, settle):
  """Whoever needs a ninth parameter lacks a noun."""
  settle('parameters', violations(long_signatures, all_sources))


def test_configs_are_short(all_sources, settle):
  """A sixteenth field is two parts that want to be apart."""
  settle('fields', violations(long_configs, all_sources))


def test_long_things_are_noticed(parse):
  """Each checker reports one too many, and passes as many as are allowed."""

  def count(check, text):
    return len(list(check(parse('deepseek_jax/a.py', text))))

  for lines, faults in ((400, 0), (401, 1)):
    assert count(lambda source: long_files(source.path, source.text), 'x = 1\n' * lines) == faults
  for lines, faults in ((59, 0), (60, 1)):
    text = 'class A:\n  def f(self):\n    """Says.\n\n    More.\n    """\n' + '    x = 1\n' * lines
    assert count(long_functions, text) == faults
  for parameters, faults in ((8, 0), (9, 1)):
    names = ', '.join(f'x{i}' for i in range(parameters - 2))
    assert count(long_signatures, f'class A:\n  def f(self, {names}, *, y, **z): ...') == faults
    assert count(long_signatures, f'def f(x, {names}, *y): ...') == faults
    text = f'class A:\n  @staticmethod\n  def f(x, {names}, *y): ...'
    assert count(long_signatures, text) == faults
  for size, faults in ((15, 0), (16, 1)):
    base = 'class B:\n  a: int\n  b: ClassVar[int]\n  c = 3\n'
    names = ''.join(f'  x{i}: int = 1\n' for i in range(size - 1))
    assert count(long_configs, f'{base}@dataclass(frozen=True)\nclass A(B):\n{names}') == faults
    assert count(long_configs, f'{base}@dataclass\nclass Rules(B):\n{names}') == 0


def test_only_kernels_are_exempt_by_rule(parse):
  """By folder, not by a word in the name."""
  assert exempt_by_rule(parse('deepseek_jax/ops/kernels/matmul.py', ''))
  assert not exempt_by_rule(parse('deepseek_jax/ops/kernels.py', ''))


@pytest.mark.parametrize(
  ('found', 'exempt', 'fault'),
  [
    ({'a.py': '500 lines'}, {}, 'a.py: 500 lines'),
    ({}, {'a.py': 'one table of published sizes'}, 'breaks nothing'),
    ({'a.py': '500 lines'}, {'a.py': 'long'}, 'no reason'),
  ],
)
def test_exemptions_are_needed_and_argued(unsettled, found, exempt, fault):
  """A violation without a row, a row without a violation, and a row without a reason all fail."""
  faults = unsettled(found, exempt)
  assert len(faults) == 1
  assert fault in faults[0]
  assert unsettled({'a.py': '500 lines'}, {'a.py': 'one table of published sizes'}) == []


def test_exemptions_belong_to_a_contract(exemptions):
  """A misspelt contract would exempt nothing and go unnoticed."""
  assert set(exemptions) == {
    'file length',
    'function length',
    'parameters',
    'fields',
    'boolean fields',
    'field names',
  }
