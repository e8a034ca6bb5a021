"""The config error."""

import pickle

import pytest

from deepseek_jax.core.config import ConfigError, did_you_mean


def test_one_message():
  error = ConfigError('depth: -1 is negative')
  assert error.messages == ('depth: -1 is negative',)
  assert str(error) == 'depth: -1 is negative'
  assert isinstance(error, ValueError)


def test_several_messages():
  error = ConfigError(text for text in ('one', 'two'))
  assert error.messages == ('one', 'two')
  assert str(error) == '- one\n- two'


@pytest.mark.parametrize('messages', ['one', ['one', 'two']])
def test_travels_between_processes(messages):
  error = ConfigError(messages)
  copy = pickle.loads(pickle.dumps(error))
  assert copy.messages == error.messages
  assert str(copy) == str(error)


@pytest.mark.parametrize(
  ('name', 'options', 'tail'),
  [
    ('depht', ['depth', 'width'], '; did you mean `depth`?'),
    ('mla', ['MLA', 'Window'], '; did you mean `MLA`?'),
    ('zebra', ['depth', 'width'], ''),
    ('depth', [], ''),
  ],
)
def test_near_matches(name, options, tail):
  assert did_you_mean(name, options) == tail
