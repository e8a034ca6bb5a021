"""What every contract test stands on: the sources of the repository and the table of exemptions."""

import ast
import dataclasses
import functools
import importlib.util
import pathlib
import subprocess
from collections.abc import Callable, Iterable

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
CODE = ('deepseek_jax', 'configs', 'experiments', 'scripts', 'tests', 'setup.py')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """One Python file, parsed.

  Attributes:
    path: from the root of the repository, with forward slashes.
    text: the file as it stands.
  """

  path: str
  text: str

  @functools.cached_property
  def tree(self) -> ast.Module:
    """The syntax tree."""
    return ast.parse(self.text, self.path)

  @property
  def package(self) -> str:
    """The room the file is in: `ops`, `lab`, `scripts`; '' for the root of `deepseek_jax`."""
    parts = self.path.removesuffix('.py').split('/')
    if parts[0] != 'deepseek_jax':
      return parts[0]
    return '' if parts[1] == '__init__' else parts[1]


@pytest.fixture(scope='session')
def root() -> pathlib.Path:
  """The root of the repository."""
  return ROOT


@pytest.fixture(scope='session')
def parse() -> Callable[[str, str], Source]:
  """Makes a source out of a path and a text, for feeding a checker something bad."""
  return lambda path, text: Source(path=path, text=text)


@pytest.fixture(scope='session')
def sources() -> Callable[..., list[Source]]:
  """Reads the Python files of the named top-level folders (or `setup.py`)."""

  def read(*tops: str) -> list[Source]:
    found = []
    for top in tops:
      base = ROOT / top
      for path in [base] if base.is_file() else sorted(base.rglob('*.py')):
        name = path.relative_to(ROOT).as_posix()
        found.append(Source(path=name, text=path.read_text(encoding='utf-8')))
    assert found, f'no Python file under {tops}'
    return found

  return read


@pytest.fixture(scope='session')
def all_sources(sources) -> list[Source]:
  """Every Python file of the repository that we wrote."""
  return sources(*(top for top in CODE if (ROOT / top).exists()))


@pytest.fixture(scope='session')
def repository_files() -> list[pathlib.Path]:
  """Files that are tracked, or would be by `git add`."""
  command = ['git', '-C', str(ROOT), 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
  try:
    listing = subprocess.run(command, capture_output=True, check=True, text=True).stdout
  except (OSError, subprocess.CalledProcessError):
    pytest.skip('not a git checkout: which files belong to the repository is not known')
  paths = [ROOT / name for name in listing.split('\0') if name]
  return [path for path in paths if path.is_file()]


def load_exemptions() -> dict[str, dict[str, str]]:
  """Reads the table beside this file, which test runs do not import by name."""
  path = pathlib.Path(__file__).with_name('exemptions.py')
  spec = importlib.util.spec_from_file_location('exemptions', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.EXEMPTIONS


def compare(found: dict[str, str], exempt: dict[str, str]) -> list[str]:
  """Lists violations that no exemption covers, and exemptions that no violation needs."""
  faults = [f'{place}: {fault}' for place, fault in found.items() if place not in exempt]
  for place, reason in exempt.items():
    if place not in found:
      faults.append(f'{place}: is exempt but breaks nothing; drop its row')
    if len(reason.split()) < 4:
      faults.append(f'{place}: {reason!r} is no reason')
  return faults


@pytest.fixture(scope='session')
def settle() -> Callable[[str, Iterable[tuple[str, str]]], None]:
  """Fails unless the violations of one contract are exactly its exemptions."""

  def check(contract: str, found: Iterable[tuple[str, str]]) -> None:
    faults = compare(dict(found), load_exemptions()[contract])
    assert not faults, f'{contract}:\n' + '\n'.join(faults)

  return check


@pytest.fixture(scope='session')
def exemptions() -> dict[str, dict[str, str]]:
  """The table of exemptions."""
  return load_exemptions()


@pytest.fixture(scope='session')
def unsettled() -> Callable[[dict[str, str], dict[str, str]], list[str]]:
  """The comparison under `settle`, so that it can be tested itself."""
  return compare
