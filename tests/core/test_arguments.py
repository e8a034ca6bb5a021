"""Arguments of the config on the command line."""

import pytest

from deepseek_jax.core.arguments import peel
from deepseek_jax.core.config import ConfigError


@pytest.mark.parametrize(
  ('argv', 'rest', 'assignments', 'path'),
  [
    (['train.py'], ['train.py'], {}, None),
    (['p', '--config=a.py', '--x=1'], ['p', '--x=1'], {}, 'a.py'),
    (['p', '--config', 'a.py', 'word'], ['p', 'word'], {}, 'a.py'),
    (['p', '-config=a.py', '-config.a=1'], ['p'], {'a': '1'}, 'a.py'),
    (['p', '--config.a.b=c=d'], ['p'], {'a.b': 'c=d'}, None),
    (['p', '--config.a.b', '-1', '--y'], ['p', '--y'], {'a.b': '-1'}, None),
    (['p', '--config.a='], ['p'], {'a': ''}, None),
    (['p', '--config.a=1', '--config.b=2', '--config.a=3'], ['p'], {'b': '2', 'a': '3'}, None),
    (['p', '--configs=1', '--config_x=2', 'config=3'], None, {}, None),
    (['p', '--config.a=1', '--', '--config.b=2'], ['p', '--', '--config.b=2'], {'a': '1'}, None),
    (['p', "--config.m=W(size=1, x='a b')"], ['p'], {'m': "W(size=1, x='a b')"}, None),
  ],
)
def test_peel(argv, rest, assignments, path):
  before = list(argv)
  found = peel(argv)
  assert found == (argv if rest is None else rest, assignments, path)
  assert list(found[1]) == list(assignments)
  assert argv == before


def test_other_prefix():
  assert peel(['p', '--run.a=1', '--config.a=2'], 'run') == (
    ['p', '--config.a=2'],
    {'a': '1'},
    None,
  )


@pytest.mark.parametrize(
  ('argv', 'messages'),
  [
    (['p', '--config=a', '--config=b'], ('--config is given twice: a and b',)),
    (['p', '--config'], ('--config needs a value: --config=…',)),
    (['p', '--config.a', '--x'], ('--config.a needs a value: --config.a=…',)),
    (['p', '--config='], ('--config needs the path of a config file',)),
    (
      ['p', '--config.=3'],
      ('--config.=3 names no field; write one like --config.model.depth=…',),
    ),
    (
      ['p', '--config.b', '--config=a', '--config=b'],
      ('--config.b needs a value: --config.b=…', '--config is given twice: a and b'),
    ),
  ],
)
def test_faults(argv, messages):
  with pytest.raises(ConfigError) as caught:
    peel(argv)
  assert caught.value.messages == messages
