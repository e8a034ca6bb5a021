"""What the README says is run."""

import pathlib
import re
import shlex

import numpy as np

from configs import quickstart, tiny_mla
from deepseek_jax.core.load import load_config
from deepseek_jax.core.override import override, override_from_text
from deepseek_jax.data.source import TextFiles
from deepseek_jax.train.display import QuietDisplay
from deepseek_jax.train.loop import train
from deepseek_jax.train.workdir import Workdir

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text()
GENERATION = (ROOT / 'docs' / 'generation.md').read_text()


def blocks(language: str, page: str = README) -> list[str]:
  """The fenced blocks of one language."""
  return re.findall(rf'```{language}\n(.*?)```', page, flags=re.DOTALL)


def test_the_lines_of_python_run(tmp_path, cache_dir, monkeypatch):
  code, published = blocks('python')
  words = np.random.default_rng(0).choice('she was very fond of the LORD'.split(), 3000)
  (tmp_path / 'text.txt').write_text(
    '\n\n'.join(' '.join(words[i : i + 50]) for i in range(0, 3000, 50))
  )
  experiment, _ = override(
    tiny_mla.get_config(),
    {
      'model.depth': 2,
      'data.source': TextFiles(str(tmp_path / 'text.txt')),
      'data.length': 32,
      'train_steps': 10,
      'schedule.warmup_steps': 2,
    },
  )
  workdir = Workdir(tmp_path / 'run')
  workdir.write(experiment)
  train(experiment, workdir, cache_dir, QuietDisplay())
  monkeypatch.setenv('HOME', str(tmp_path))
  names: dict = {}
  exec(code.replace('runs/quickstart', str(workdir.path)), names)
  assert names['logits'].ndim == 2
  assert np.isfinite(names['logits']).all()
  assert type(names['other'].experiment.model.attention).__name__ == 'Window'
  assert names['other'].fresh == ()
  assert len(names['losses']) == 10
  assert names['losses'][-1] < names['losses'][0]
  assert names['trained'].step == 10
  assert len(names['chat'].messages) == 2
  exec(published.replace("'tests/", f"'{ROOT}/tests/"), names)
  assert names['model'].logits(names['rows']).shape == (3, 7, 96)
  assert names['gated'].fresh
  check_generation(str(workdir.path), tmp_path)


def check_generation(run: str, tmp_path: pathlib.Path) -> None:
  """Runs the page on generation, as one program."""
  places = {'runs/quickstart': run, 'runs/exported': str(tmp_path / 'exported')}
  code = ''.join(blocks('python', GENERATION))
  for said, place in places.items():
    assert said in code
    code = code.replace(said, place)
  names: dict = {}
  exec(code, names)
  assert names['text']
  assert len(names['several']) == 3
  assert len(names['ids'][0]) <= 4
  assert names['chat'].messages[0]['role'] == 'system'
  assert len(names['chat'].messages) == 5
  assert names['names']
  assert (tmp_path / 'exported' / 'config.json').is_file()


def test_the_swaps_are_valid():
  (block,) = [text for text in blocks('sh') if 'Gated(' in text]
  swaps = [shlex.split(line, comments=True)[0] for line in block.strip().splitlines()]
  assert len(swaps) > 6
  for swap in swaps:
    path, _, value = swap.removeprefix('--config.').partition('=')
    changed, changes = override_from_text(quickstart.get_config(), {path: value})
    assert changes, swap
    assert changed != quickstart.get_config()


def test_the_files_and_configs_it_names_exist():
  for target in re.findall(r'\]\((?!http)([^)#]+)\)', README):
    assert (ROOT / target).exists(), target
  for name in re.findall(r"--config=('[^']+'|\S+)", README):
    assert load_config(name.strip("'")).name
  for script in re.findall(r'scripts/\w+\.(?:py|sh)', README):
    assert (ROOT / script).exists(), script
