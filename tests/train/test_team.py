"""What differs between the first process and the others; real ones are in tests/processes."""

import io

from deepseek_jax.train.display import Both, LineDisplay, QuietDisplay
from deepseek_jax.train.interrupt import Stop
from deepseek_jax.train.team import Alone, make_team
from deepseek_jax.train.workdir import Follower, Workdir


def test_one_process_is_alone():
  team = make_team(QuietDisplay(), Workdir('.').rows('faults.jsonl'))
  assert isinstance(team, Alone)
  assert team.figures() == {}
  stop = Stop()
  assert team.in_background(lambda: 3, stop) == 3
  assert team.stopping(1, stop, None, 0.0) is None
  stop.requested = 'SIGTERM'
  assert team.stopping(2, stop, None, 0.0) == 'SIGTERM'


def test_a_follower_shows_numbers_and_writes_none(tmp_path):
  shown = io.StringIO()
  folder = Follower(tmp_path)
  with folder.writer(LineDisplay(10, stream=shown)) as writer:
    assert writer.truncate(3) == 0
    writer.write(4, {'loss': 1.5})
    writer.write_scalars(4, 'heldout', {'loss': 1.0})
  folder.rows(folder.faults).append({'step': 4})
  assert folder.rows(folder.faults).truncate(0) == 0
  assert 'loss  1.500' in shown.getvalue()
  assert list(tmp_path.iterdir()) == []
  # The first process does write, in the same places.
  first = Workdir(tmp_path)
  with first.writer(QuietDisplay()) as writer:
    writer.write(4, {'loss': 1.5})
  first.rows(first.faults).append({'step': 4})
  names = sorted(path.name for path in tmp_path.iterdir())
  assert names == ['faults.jsonl', 'metrics.jsonl', 'tensorboard']


def test_both_displays_show_the_same():
  streams = io.StringIO(), io.StringIO()
  both = Both(*(LineDisplay(10, stream=stream) for stream in streams))
  both.message('hello')
  both.update(1, {'loss': 2.0})
  both.close()
  assert streams[0].getvalue() == streams[1].getvalue()
  assert streams[0].getvalue().startswith('hello\nstep  1/10')
