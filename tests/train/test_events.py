"""The file of starts and ends."""

from deepseek_jax.train.events import record
from deepseek_jax.train.metrics import JsonLines


def test_events_are_rows_with_a_time(tmp_path):
  record(tmp_path, 0, 'started')
  record(tmp_path, 7, 'stopped', 'SIGTERM')
  first, second = JsonLines(tmp_path / 'events.jsonl').read()
  assert first['event'] == 'started'
  assert 'reason' not in first
  assert (second['step'], second['event'], second['reason']) == (7, 'stopped', 'SIGTERM')
  assert second['time'].endswith('+00:00')
