"""The page of published claims: every claim is there once, with a verdict that means something."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / 'experiments' / 'published_claims' / 'README.md'
CLAIMS = {'M': 6, 'A': 6, 'V': 4, 'P': 8, 'N': 6, 'T': 5, 'D': 4, 'S': 5, 'E': 1, 'H': 1}
"""How many claims each group has, numbered from 1."""
COLUMNS = ['id', 'claim', 'our definition', 'command', 'result with spread', 'verdict']
MEASURED = ('confirmed', 'refuted', 'confirmed in direction only')
ONE = re.compile(rf'\*(?:{"|".join(MEASURED)}|untestable here, because [^*]+|not yet)\*')
EMPTY = '—'


def table(text: str) -> list[dict[str, str]]:
  """The rows of the page's one table; an escaped bar is text."""
  lines = [line for line in text.splitlines() if line.startswith('|')]
  cells = [[cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]] for line in lines]
  assert cells[0] == COLUMNS
  assert all(len(row) == len(COLUMNS) for row in cells), [r for r in cells if len(r) != 6]
  return [dict(zip(COLUMNS, row)) for row in cells[2:]]


def faults(row: dict[str, str]) -> list[str]:
  """What is wrong with a row."""
  found = []
  verdicts = ONE.findall(row['verdict'])
  if not verdicts or not row['verdict'].startswith('*'):
    found.append(f'{row["id"]}: {row["verdict"]!r} is no verdict')
  if len(row['claim']) < 10:
    found.append(f'{row["id"]}: the claim is missing')
  if any(verdict.strip('*') in MEASURED for verdict in verdicts):
    for column in ('our definition', 'result with spread'):
      if row[column] == EMPTY:
        found.append(f'{row["id"]}: a verdict without {column}')
    if row['command'] == EMPTY and 'arithmetic' not in row['our definition']:
      found.append(f'{row["id"]}: a verdict without command')
  return found


def test_every_claim_stands_once_in_order():
  expected = [f'{group}{i + 1}' for group, count in CLAIMS.items() for i in range(count)]
  assert [row['id'] for row in table(PAGE.read_text(encoding='utf-8'))] == expected


def test_every_row_has_a_verdict_that_it_earned():
  found = [fault for row in table(PAGE.read_text(encoding='utf-8')) for fault in faults(row)]
  assert not found, '\n'.join(found)


def test_the_commands_exist():
  for row in table(PAGE.read_text(encoding='utf-8')):
    for script in re.findall(r'(?:scripts|experiments)/[\w/]+\.(?:py|sh)', row['command']):
      assert (ROOT / script).exists(), f'{row["id"]}: {script}'


@pytest.mark.parametrize(
  ('changes', 'count'),
  [
    ({'verdict': '*not yet*'}, 0),
    ({'verdict': '*untestable here, because there is no FP8 unit*'}, 0),
    ({'verdict': '*untestable here, because*'}, 1),
    ({'verdict': '*untestable here*'}, 1),
    ({'verdict': 'probably'}, 1),
    ({'verdict': ''}, 1),
    ({'verdict': '*confirmed*'}, 3),
    ({'verdict': '*refuted*', 'our definition': 'by arithmetic', 'result with spread': '9 > 3'}, 0),
    ({'verdict': '*not yet*', 'claim': ''}, 1),
    (
      {
        'verdict': 'memory: *confirmed*; speed: *not yet*',
        'our definition': 'x',
        'command': 'y',
        'result with spread': 'z',
      },
      1,
    ),
    (
      {
        'verdict': '*confirmed in direction only* (memory), *not yet* (speed)',
        'our definition': 'x',
        'command': 'y',
        'result with spread': 'z',
      },
      0,
    ),
  ],
)
def test_bad_rows_are_noticed(changes, count):
  row = dict.fromkeys(COLUMNS, EMPTY) | {'id': 'X1', 'claim': 'twice as fast'} | changes
  assert len(faults(row)) == count
