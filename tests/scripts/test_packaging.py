"""What a wheel holds beside Python: every data file of the package."""

import ast
import fnmatch
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def asked_for():
  """What `setup.py` asks for, read as text: running it needs tools that a test may not have."""
  tree = ast.parse((ROOT / 'setup.py').read_text(encoding='utf-8'))
  (call,) = (
    node
    for node in ast.walk(tree)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'setuptools.setup'
  )
  wanted = ('package_data', 'install_requires')
  return {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in wanted}


def test_every_data_file_is_packaged(asked_for):
  patterns = asked_for['package_data']['deepseek_jax']
  folder = ROOT / 'deepseek_jax'
  files = [
    path.relative_to(folder).as_posix()
    for path in folder.rglob('*')
    if path.is_file() and path.suffix not in ('.py', '.pyc')
  ]
  assert {'data/images/openclipart.webp.bin', 'data/images/PROVENANCE.md'} <= set(files)
  left = [file for file in files if not any(fnmatch.fnmatch(file, p) for p in patterns)]
  assert left == []
  assert all(any(fnmatch.fnmatch(file, p) for file in files) for p in patterns)


def test_what_decodes_pictures_is_required(asked_for):
  assert any(need.startswith('pillow') for need in asked_for['install_requires'])
  # Drawing them is for one script alone.
  assert not any('cairo' in need for need in asked_for['install_requires'])
