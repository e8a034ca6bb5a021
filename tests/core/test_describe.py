"""Numbers and tables as text."""

import math

import pytest

from deepseek_jax.core.describe import bytes_text, duration, si, table


def test_table():
  rows = [('layers/0/w', 12, '1.50 GiB'), ('b', 3456, '12 B')]
  assert table(rows, ('path', 'count', 'memory')).splitlines() == [
    'path        count    memory',
    '----------  -----  --------',
    'layers/0/w     12  1.50 GiB',
    'b            3456      12 B',
  ]
  assert table([], ('a', 'bc')) == 'a  bc\n-  --'
  assert table([(True, None)], ('yes', 'no')) == 'yes   no\n----  ----\nTrue  None'


def test_ragged_table():
  with pytest.raises(ValueError, match='has 1 cells, not 2'):
    table([(1,)], ('a', 'b'))


@pytest.mark.parametrize(
  ('number', 'text'),
  [
    (0, '0'),
    (999, '999'),
    (-5, '-5'),
    (0.12345678, '0.1235'),
    (1000, '1.00 K'),
    (999_994, '999.99 K'),
    (999_999, '1.00 M'),
    (671_026_419_200, '671.03 B'),
    (-2_500_000, '-2.50 M'),
    (3.3e24, '3300000000.00 Q'),
    (14.8e12, '14.80 T'),
    (math.inf, 'inf'),
    (math.nan, 'nan'),
  ],
)
def test_si(number, text):
  assert si(number) == text


@pytest.mark.parametrize(
  ('number', 'text'),
  [
    (0, '0 B'),
    (1023, '1023 B'),
    (1024, '1.00 KiB'),
    (1_610_612_736, '1.50 GiB'),
    (2**20 - 1, '1.00 MiB'),
    (5 * 2**50, '5.00 PiB'),
  ],
)
def test_bytes(number, text):
  assert bytes_text(number) == text


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (0, '0 ms'),
    (0.00123, '1.23 ms'),
    (0.85, '850 ms'),
    (0.9999, '1.0 s'),
    (12.34, '12.3 s'),
    (59.94, '59.9 s'),
    (59.96, '1 min 00 s'),
    (185, '3 min 05 s'),
    (3599.6, '1 h 00 min'),
    (3720, '1 h 02 min'),
    (86399, '1 d 00 h'),
    (2 * 86400 + 3 * 3600, '2 d 03 h'),
    (-5, '-5.0 s'),
    (math.inf, '∞'),
    (-math.inf, '-∞'),
    (math.nan, '?'),
  ],
)
def test_duration(seconds, text):
  assert duration(seconds) == text
