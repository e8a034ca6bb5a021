"""Which variant each is compared with, by their names."""

import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.lab.groups import families, pair_up

LADDER = ['depth_2,low', 'depth_2,rule', 'depth_3,low', 'depth_3,rule']


def test_one_baseline():
  names = ['plain', 'wide', 'deep,wide']
  assert pair_up('wide', names) == dict.fromkeys(names, 'wide')
  assert families('wide', names) == {'': names}


def test_a_baseline_in_every_group():
  assert pair_up('rule', LADDER) == {
    'depth_2,low': 'depth_2,rule',
    'depth_2,rule': 'depth_2,rule',
    'depth_3,low': 'depth_3,rule',
    'depth_3,rule': 'depth_3,rule',
  }
  assert families('rule', LADDER) == {
    'low': ['depth_2,low', 'depth_3,low'],
    'rule': ['depth_2,rule', 'depth_3,rule'],
  }


@pytest.mark.parametrize(
  ('baseline', 'names', 'words'),
  [
    ('rul', LADDER, "'rul', which is none of .*did you mean `rule`"),
    ('depth_2', LADDER, 'which is none of'),
    ('rule', LADDER[:3], "the last part of some names, and there is no 'depth_3,rule'"),
    ('rule', ['plain', 'depth_2,rule'], "there is no 'rule'"),
  ],
)
def test_no_such_variant(baseline, names, words):
  with pytest.raises(ConfigError, match=words):
    pair_up(baseline, names)
