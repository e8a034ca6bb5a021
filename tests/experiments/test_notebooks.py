"""The notebooks run from top to bottom, on a small model and for few steps."""

import pathlib
import re
import sys
import types

import jax
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'experiments' / 'notebooks'
NOTEBOOKS = sorted(FOLDER.glob('*.py'))
PARAMETERS = '# %% tags=["parameters"]\n'
SHORT = """
# %% what the test puts after the cell tagged `parameters`, as papermill would
from configs import tiny_mla
from deepseek_jax.core.override import override

BASE, _ = override(
  tiny_mla.get_config(), {'model.mtp': None, 'model.depth': 1, 'model.dense_layers': 0}
)
STEPS, SEEDS = 8, 1

"""

pytestmark = [
  # treescope 0.1.10 lists all names of NumPy 2.5, also those that warn (November 2026).
  pytest.mark.filterwarnings('ignore:The chararray class is deprecated:DeprecationWarning'),
]


def cells(path: pathlib.Path) -> list[str]:
  """The cells of a py:percent source; what comes before the first is left out."""
  return re.split(r'^(?=# %%)', path.read_text(encoding='utf-8'), flags=re.MULTILINE)[1:]


@pytest.fixture
def run(cache_dir, tmp_path, monkeypatch):
  """Runs a notebook with small parameters; returns its names."""
  (tmp_path / '.cache').mkdir()
  (tmp_path / '.cache' / 'deepseek_jax').symlink_to(cache_dir)
  monkeypatch.setenv('HOME', str(tmp_path))

  def execute(name: str) -> dict:
    path = FOLDER / f'{name}.py'
    parts = cells(path)
    (place,) = [i for i, cell in enumerate(parts) if cell.startswith(PARAMETERS)]
    parts.insert(place + 1, SHORT)
    module = types.ModuleType(f'notebook_{name}')
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(''.join(parts), str(path), 'exec'), module.__dict__)
    return vars(module)

  return execute


def test_first_look(run, capsys):
  """It trains, and every look inside shows something true."""
  names = run('first_look')
  loss = names['trial'].curves['loss']
  assert loss.shape == (1, 8)
  assert loss[0, -1] < loss[0, 0] - 0.2
  assert 'layers/0/attention/output' in capsys.readouterr().out
  for weights in names['maps'].weights:
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=1e-5)
  assert names['lens'].log_probabilities.shape[:2] == (2, len(names['TEXT']) + 1)
  assert names['load'].tokens.sum() > 100


def test_swap_a_part(run, capsys):
  """The window is seen in the map, and the table has both variants."""
  names = run('swap_a_part')
  said = capsys.readouterr().out
  assert 'Window' in said
  assert '(changed)' not in said
  (weights,) = names['maps'].weights
  assert not np.triu(weights, 1).any()
  assert not weights[:, 60, 2:29].any()
  assert weights[:, 60, 29:61].all()


@pytest.mark.slow
def test_bring_your_own(run, capsys):
  """Kinds of the notebook's own learn; attention fades, and the hash chooses by the id alone."""
  names = run('bring_your_own')
  said = capsys.readouterr().out
  for name, kind in (('attention', names['Fading']), ('feed_forward', names['TokenHash'])):
    assert kind.__module__ == 'notebook_bring_your_own', name
  own = names['trials']['own attention'].experiment.model
  assert type(own.attention) is names['Fading']
  assert (
    type(names['trials']['own router'].experiment.model.feed_forward.router) is (names['TokenHash'])
  )
  for trial in names['trials'].values():
    assert trial.curves['loss'][0, -1] < trial.curves['loss'][0, 0] - 0.2
  assert 'own router' in said.splitlines()[-2]
  routed = names['trials']['own router']
  assert not jax.tree.leaves(routed.model.variables['buffers'])
  (counts,) = names['load'].counts
  blank = names['load'].classes.index('white space')
  # A blank, a line feed: two ids at most, each with two experts.
  assert np.count_nonzero(counts[blank]) <= 4


def test_sources_are_notebooks():
  """Every notebook is named here, begins with its title and has one cell of parameters."""
  assert {path.stem for path in NOTEBOOKS} == {'first_look', 'swap_a_part', 'bring_your_own'}
  for path in NOTEBOOKS:
    parts = cells(path)
    assert ''.join(parts) == path.read_text(encoding='utf-8')
    assert parts[0].startswith('# %% [markdown]\n"""# ')
    assert sum(part.startswith(PARAMETERS) for part in parts) == 1
    for part in parts:
      text = part.partition('\n')[2].strip()
      assert (part.startswith('# %% [markdown]')) == text.startswith('"""'), part
