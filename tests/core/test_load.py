"""Config files: found, run, and every way they can be wrong."""

import textwrap

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.load import load_config

GOOD = """
  from __future__ import annotations
  import dataclasses
  from deepseek_jax.core.override import override_from_text

  @dataclasses.dataclass(frozen=True)
  class Run:
    depth: int = 3
    inner: Run | None = None

  def get_config():
    return override_from_text(Run(), {'depth': '4', 'inner': 'Run'})[0]

  def get_small():
    return Run(1)
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('sys.dont_write_bytecode', True)

  def write(name, text):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(textwrap.dedent(text))
    return file

  return write


def test_file(write):
  config = load_config(write('configs/first.py', GOOD))
  assert config.depth == 4
  assert config.inner.depth == 3
  assert load_config('configs/first.py', 'get_small').depth == 1


def test_bare_name_and_missing_suffix(write):
  write('configs/first.py', GOOD)
  assert load_config('first').depth == 4
  assert load_config('configs/first').depth == 4


def test_changed_file_is_read_again(write):
  file = write('run.py', GOOD)
  assert load_config(file).depth == 4
  write('run.py', GOOD.replace("'4'", "'12'"))
  assert load_config(file).depth == 12


def test_files_of_one_name_do_not_mix(write):
  one = load_config(write('a/run.py', GOOD))
  two = load_config(write('b/run.py', GOOD))
  assert type(one).__module__ != type(two).__module__


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('frist', 'there is no config file frist; did you mean `configs/first.py`?'),
    (
      'configs/frist.py',
      'there is no config file configs/frist.py; did you mean `configs/first.py`?',
    ),
    ('nowhere/first.py', 'there is no config file nowhere/first.py; there is no folder nowhere'),
    ('configs/zebra.py', 'there is no config file configs/zebra.py'),
    ('configs', 'there is no config file configs'),
  ],
)
def test_missing_file(write, path, message):
  write('configs/first.py', GOOD)
  with pytest.raises(ConfigError) as caught:
    load_config(path)
  assert str(caught.value) == message


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('def get_confg():\n  pass', 'run.py has no function `get_config`; did you mean `get_confg`?'),
    ('def build(): pass', 'run.py has no function `get_config`; it has build'),
    ('x = 1', 'run.py has no function `get_config`'),
    ('def get_config():\n  return 3', '`get_config` in run.py returns 3, which is not a config'),
    ('x = 1\n\ny = zzz', "run.py:3: NameError: name 'zzz' is not defined"),
    ('x = (\n', "run.py:1: SyntaxError: '(' was never closed"),
    ('def get_config():\n  x = 1\n  return 1 / 0', 'run.py:3: ZeroDivisionError: division by zero'),
    ('def get_config(x): pass', 'run.py: TypeError: get_config() missing 1 required positional'),
    (
      'from deepseek_jax.core.config import ConfigError\n'
      "def get_config():\n  raise ConfigError('depth: too deep')",
      'run.py:3: depth: too deep',
    ),
    (
      'from deepseek_jax.core.load import load_config\nload_config("nope.py")',
      'run.py:2: there is no config file nope.py',
    ),
  ],
)
def test_faulty_file(write, text, message):
  write('run.py', text)
  with pytest.raises(ConfigError) as caught:
    load_config('run.py')
  assert str(caught.value).startswith(message)
  assert len(str(caught.value).splitlines()) == 1


LADDER = GOOD.replace('def get_config():', 'def get_config(depth: int = 4, scale: float = 1.0):')


def test_arguments(write):
  write('configs/ladder.py', LADDER.replace("'4'", 'depth'))
  assert load_config('ladder').depth == 4
  assert load_config('ladder(depth=7)').depth == 7
  assert load_config('configs/ladder.py(depth=2**3 - 1, scale=2)').depth == 7
  # A file may be called anything.
  write('odd(depth=7).py', LADDER.replace("'4'", 'depth'))
  assert load_config('odd(depth=7).py').depth == 4


@pytest.mark.parametrize(
  ('path', 'messages'),
  [
    (
      'ladder(dept=7, scale="x")',
      (
        '`get_config` in configs/ladder.py takes no argument `dept`; did you mean `depth`?',
        '`get_config` in configs/ladder.py: scale: \'"x"\' is not float',
      ),
    ),
    (
      'ladder(depth=7.0)',
      ("`get_config` in configs/ladder.py: depth: '7.0' is not int; did you mean 7?",),
    ),
    ('ladder(depth=x)', ("`get_config` in configs/ladder.py: depth: 'x' is not int",)),
    (
      'first(depth=7)',
      ('`get_config` in configs/first.py takes no argument `depth`; it takes none',),
    ),
    *(
      (text, (f'config {text}: expected the file and arguments by name, such as ladder(depth=4)',))
      for text in ('ladder(7)', 'ladder(depth=7', 'ladder(**{})', 'ladder(depth=1)(2)')
    ),
  ],
)  # fmt: skip
def test_wrong_arguments(write, path, messages):
  write('configs/ladder.py', LADDER)
  write('configs/first.py', GOOD)
  with pytest.raises(ConfigError) as caught:
    load_config(path)
  assert caught.value.messages == messages
