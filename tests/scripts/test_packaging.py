"""What a wheel holds beside Python: every data file of the package."""

import fnmatch
import pathlib
import runpy

import setuptools

ROOT = pathlib.Path(__file__).resolve().parents[2]


def asked_for(monkeypatch):
  """The arguments of `setup`, without building anything."""
  caught = {}
  monkeypatch.setattr(setuptools, 'setup', caught.update)
  runpy.run_path(str(ROOT / 'setup.py'))
  return caught


def test_every_data_file_is_packaged(monkeypatch):
  patterns = asked_for(monkeypatch)['package_data']['deepseek_jax']
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


def test_what_decodes_pictures_is_required(monkeypatch):
  arguments = asked_for(monkeypatch)
  assert any(need.startswith('pillow') for need in arguments['install_requires'])
  # Drawing them is for one script alone.
  assert not any('cairo' in need for need in arguments['install_requires'])
