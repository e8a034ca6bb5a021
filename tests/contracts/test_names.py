"""Names that say nothing, and fields that are really kinds."""

import ast
import pathlib
import re

import pytest

EMPTY_WORDS = {'utils', 'util', 'common', 'misc', 'lib', 'helpers', 'helper', 'base'}
FIELD_PREFIX = re.compile(r'(use|enable|disable|num|n)_')


def empty_names(path: pathlib.PurePath):
  """Lists the parts of a path that say nothing about what is inside."""
  return [part for part in path.parts if part.split('.')[0].lower() in EMPTY_WORDS]


def fields(source):
  """Yields (place, name, annotation) of every field of a dataclass or a Flax module."""
  for node in ast.walk(source.tree):
    if not isinstance(node, ast.ClassDef):
      continue
    words = [ast.unparse(n) for n in (*node.decorator_list, *node.bases)]
    if not any('dataclass' in word or word.endswith('Module') for word in words):
      continue
    for item in node.body:
      if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
        name = item.target.id
        yield f'{source.path}::{node.name}.{name}', name, ast.unparse(item.annotation)


def badly_named_fields(source):
  """Yields fields whose name hides a kind or repeats what a plural says."""
  for place, name, _ in fields(source):
    if FIELD_PREFIX.match(name):
      yield place, 'a count is a plural noun, and a switch a union not yet written'


def boolean_fields(source):
  """Yields fields that are true or false."""
  for place, _, annotation in fields(source):
    if re.search(r'\bbool\b', annotation):
      yield place, 'say which kind it is, or None for absent'


def ours(all_sources):
  """Sources whose dataclasses are configs: everything but the tests."""
  return [source for source in all_sources if not source.path.startswith('tests/')]


def test_no_file_or_folder_is_named_for_nothing(repository_files, root):
  """A file is named for what it holds."""
  paths = [path.relative_to(root) for path in repository_files]
  faults = [str(path) for path in paths if empty_names(path)]
  assert not faults, '\n'.join(faults)


def test_fields_are_nouns(all_sources, settle):
  """`heads`, not `num_heads`."""
  settle('field names', [v for s in ours(all_sources) for v in badly_named_fields(s)])


def test_fields_are_not_booleans(all_sources, settle):
  """A third variant cannot be added to a boolean."""
  settle('boolean fields', [v for s in ours(all_sources) for v in boolean_fields(s)])


@pytest.mark.parametrize(
  'path', ['a/utils/b.py', 'a/common.py', 'lib/x', 'a/base.test.py', 'Misc/a.py', 'a/helpers.sh']
)
def test_empty_names_are_noticed(path):
  """In any part of the path and with any ending."""
  assert empty_names(pathlib.PurePosixPath(path))


def test_good_names_pass():
  """A word inside a longer one is fine."""
  assert not empty_names(pathlib.PurePosixPath('ops/baseline.py'))
  assert not empty_names(pathlib.PurePosixPath('library/commonplace.py'))


@pytest.mark.parametrize(
  ('field', 'badly_named', 'boolean'),
  [
    ('use_bias: int', 1, 0),
    ('enable_x: str', 1, 0),
    ('disable_x: str', 1, 0),
    ('num_heads: int', 1, 0),
    ('n_layers: int', 1, 0),
    ('bias: bool', 0, 1),
    ('bias: bool | None = None', 0, 1),
    ('bias: tuple[bool, ...]', 0, 1),
    ('use_bias: bool = False', 1, 1),
    ('heads: int', 0, 0),
    ('nodes: int', 0, 0),
    ('used_tokens: int', 0, 0),
    ('boolean: Boolean', 0, 0),
  ],
)
@pytest.mark.parametrize(
  'head',
  ['@dataclasses.dataclass(frozen=True, kw_only=True)\nclass A:', 'class A(nn.Module):'],
)
def test_bad_fields_are_noticed(parse, head, field, badly_named, boolean):
  """In configs and in modules."""
  source = parse('deepseek_jax/a.py', f'{head}\n  {field}\n')
  assert len(list(badly_named_fields(source))) == badly_named
  assert len(list(boolean_fields(source))) == boolean


def test_plain_classes_have_no_fields(parse):
  """An annotation in a class that is no dataclass is not a field."""
  assert not list(boolean_fields(parse('deepseek_jax/a.py', 'class A:\n  bias: bool = True\n')))
