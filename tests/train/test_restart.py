"""A run goes on where the newest whole state is, in whichever tier."""

import pytest

from configs import tiny_mla
from deepseek_jax.core.override import override
from deepseek_jax.data.source import TextFiles
from deepseek_jax.train.display import QuietDisplay
from deepseek_jax.train.loop import train
from deepseek_jax.train.metrics import JsonLines
from deepseek_jax.train.snapshot import Snapshot
from deepseek_jax.train.workdir import Workdir
from tests.processes.conftest import assert_same_bits, rows


class CrashError(Exception):
  """What kills the run."""


class Crashing(QuietDisplay):
  """Fails at a step; remembers what was said."""

  def __init__(self, step: int):
    """Says when."""
    self.step, self.said = step, []

  def update(self, step, metrics):
    """Fails."""
    if step == self.step:
      raise CrashError

  def message(self, text):
    """Remembers."""
    self.said.append(text)


@pytest.mark.slow
def test_a_crash_between_checkpoints_costs_the_steps_since_the_snapshot(text, tmp_path, cache_dir):
  config, _ = override(
    tiny_mla.get_config(),
    {
      'model.depth': 2,
      'model.dense_layers': 2,
      'model.mtp': None,
      'data.source': TextFiles(text),
      'data.length': 32,
      'schedule.warmup_steps': 2,
      'train_steps': 8,
      'cadence.log': 1,
      'cadence.save': 4,
    },
  )
  kept, _ = override(config, {'cadence.snapshot': Snapshot(every=1)})
  whole, broken = Workdir(tmp_path / 'whole'), Workdir(tmp_path / 'broken')
  whole.write(config)
  train(config, whole, cache_dir, QuietDisplay())
  broken.write(kept)
  with pytest.raises(CrashError):
    train(kept, broken, cache_dir, Crashing(7))
  display = Crashing(0)
  train(kept, broken, cache_dir, display)
  (found,) = [line for line in display.said if line.startswith('going on')]
  # A step is on its way while the one before is read; a write may have been skipped.
  assert found in {f'going on after step {n}, from snapshots …' for n in (6, 7)}
  assert [row['step'] for row in rows(broken.path)] == list(range(1, 9))
  assert rows(whole.path) == rows(broken.path)
  assert_same_bits(whole.path, broken.path, 8)
  assert JsonLines(broken.faults).read() == []
