"""Tests of the set-up: which Python it takes, what it does twice, and what happens on a failure.

Nothing here uses the network: a stand-in interpreter makes environments whose pip only writes down
what it was asked to do.
"""

import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHELL_SCRIPTS = (*sorted((ROOT / 'scripts').glob('*.sh')), ROOT / '.ci' / 'run')
BASE_PYTHON = pathlib.Path(sys._base_executable).resolve()
# What setup.sh and a virtual environment need besides Python; a PATH of only these has no Python.
TOOLS = ('bash', 'env', 'dirname', 'readlink', 'sed', 'tail', 'rm', 'mkdir', 'mv', 'ls', 'cp')

FAKE_PYTHON = f"""#!/bin/bash
if [[ "$*" == *'-m venv'* ]]; then
  '{BASE_PYTHON}' -I -m venv --without-pip "${{@: -1}}" || exit 1
  for site in "${{@: -1}}"/lib/python*/site-packages; do cp -r "$FAKE/pip" "$site/"; done
else
  exec '{BASE_PYTHON}' "$@"
fi
"""

FAKE_PIP = """
import os, pathlib, sys, time
fake = pathlib.Path(os.environ['FAKE'])
with (fake / 'calls').open('a') as file:
  print(*sys.argv[1:], file=file)
deadline = time.monotonic() + 60
while (fake / 'hang').exists() and time.monotonic() < deadline:
  (fake / 'hanging').touch()
  time.sleep(0.02)
failures = fake / 'failures'
if 'install' in sys.argv and failures.exists():
  left = int(failures.read_text())
  failures.write_text(str(left - 1))
  if left > 0:
    sys.exit('the network is down')
"""


class Clone:
  """A small copy of the repository in a folder of its own, with a stand-in for Python and pip."""

  def __init__(self, folder: pathlib.Path):
    self.root = folder / 'a clone'
    self.fake = folder / 'fake'
    self.home = folder / 'home'
    self.bin = folder / 'bin'
    for made in (self.root / 'scripts', self.root / 'deepseek_jax', self.home, self.bin):
      made.mkdir(parents=True)
    for name in ('scripts/setup.sh', 'setup.py'):
      shutil.copy(ROOT / name, self.root / name)
    (self.root / 'deepseek_jax' / '__init__.py').write_text("__version__ = '0.1.0'\n")
    (self.root / 'requirements.lock').write_text('example==1.0 \\\n    --hash=sha256:00\n')
    (self.fake / 'pip').mkdir(parents=True)
    (self.fake / 'pip' / '__init__.py').touch()
    (self.fake / 'pip' / '__main__.py').write_text(FAKE_PIP)
    for tool in TOOLS:
      (self.bin / tool).symlink_to(shutil.which(tool))
    self.program('sleep', '#!/bin/bash\necho "$1" >>"$FAKE/pauses"\n')

  def program(self, name: str, text: str, folder: pathlib.Path | None = None) -> pathlib.Path:
    path = (folder or self.bin) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path

  def start(self, *arguments: str, script: pathlib.Path | None = None, **variables: str):
    # A bare environment: nothing of the caller's (PYTHON, PYENV_ROOT, …) may decide a test.
    environment = {'PATH': str(self.bin), 'HOME': str(self.home), 'FAKE': str(self.fake)}
    return subprocess.Popen(
      [script or self.root / 'scripts' / 'setup.sh', *arguments],
      env=environment | variables,
      cwd=self.home,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )

  def start_hanging(self):
    """Starts a run and returns it when its pip has begun, which goes on once `hang` is removed."""
    (self.fake / 'hang').touch()
    process = self.start()
    deadline = time.monotonic() + 60
    while not (self.fake / 'hanging').exists():
      assert time.monotonic() < deadline
      time.sleep(0.02)
    return process

  def run(self, *arguments: str, **options) -> tuple[int, list[str]]:
    process = self.start(*arguments, **options)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output.splitlines()

  def calls(self) -> list[str]:
    """Returns what pip was asked since the last look."""
    path = self.fake / 'calls'
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


@pytest.fixture
def clone(tmp_path):
  return Clone(tmp_path)


@pytest.fixture
def ready(clone):
  """A clone in which the set-up has run once."""
  clone.program('python3.13', FAKE_PYTHON)
  code, lines = clone.run()
  assert code == 0, lines
  return clone


def tool(name: str) -> str:
  found = shutil.which(name, path=f'{sys.prefix}/bin{os.pathsep}{os.environ["PATH"]}')
  return found or pytest.skip(f'{name} is not installed here')


@pytest.mark.parametrize('script', SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_sound(script):
  assert os.access(script, os.X_OK)
  subprocess.run(['bash', '-n', script], check=True)


def test_shellcheck_is_clean():
  done = subprocess.run([tool('shellcheck'), *SHELL_SCRIPTS], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_hadolint_is_clean():
  done = subprocess.run([tool('hadolint'), ROOT / 'Dockerfile'], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_without_python_it_says_so_in_one_line(clone):
  code, lines = clone.run()
  assert code != 0
  assert len(lines) == 1
  assert 'install python3.13' in lines[0]
  assert not (clone.root / '.venv').exists()


def test_broken_shims_and_old_pythons_are_passed_over(clone):
  clone.program('python3.13', '#!/bin/bash\necho "python3.13: command not found" >&2; exit 127\n')
  clone.program('python3.12', '#!/bin/bash\nexit 4\n')
  later = clone.home / 'later'
  clone.program('python3.12', FAKE_PYTHON, later)
  code, lines = clone.run(PATH=f'{clone.bin}:{later}')
  assert code == 0
  assert f'({later}/python3.12)' in lines[0]
  assert 'command not found' not in '\n'.join(lines)


def test_versions_kept_by_pyenv_are_found(clone):
  kept = clone.home / '.pyenv' / 'versions'
  clone.program('python', '#!/bin/bash\nexit 4\n', kept / '3.11.9' / 'bin')
  clone.program('python', FAKE_PYTHON, kept / '3.12.7' / 'bin')
  code, lines = clone.run()
  assert code == 0
  assert '3.12.7/bin/python' in lines[0]


def test_uv_is_asked_last(clone):
  kept = clone.program('python3.13', FAKE_PYTHON, clone.home / 'kept')
  clone.program('uv', f'#!/bin/bash\n[[ $1 == python && $2 == find ]] && echo "{kept}"\n')
  code, lines = clone.run()
  assert code == 0
  assert f'({kept})' in lines[0]


def test_a_python_that_cannot_make_environments_is_named(clone):
  path = clone.program('python3', '#!/bin/bash\nexit 5\n')
  code, lines = clone.run()
  assert code != 0
  assert len(lines) == 1
  assert f'{path} has no venv module' in lines[0]


def test_the_python_variable_decides(clone):
  clone.program('python3.13', FAKE_PYTHON)
  code, lines = clone.run(PYTHON='/nowhere/python')
  assert code != 0
  assert len(lines) == 1
  chosen = clone.program('mine', FAKE_PYTHON, clone.home)
  code, lines = clone.run(PYTHON=str(chosen))
  assert code == 0
  assert f'({chosen})' in lines[0]


def test_installs_the_lock_by_hash_and_the_package_for_editing(ready):
  first, second, third = ready.calls()
  assert '--require-hashes' in first
  assert f'--requirement {ready.root}/requirements.lock' in first
  assert second.endswith(f'--editable {ready.root}')
  assert {'--no-deps', '--no-index', '--no-build-isolation'} <= set(second.split())
  assert third == 'check'


def test_the_second_run_does_nothing_and_is_quick(ready, tmp_path):
  ready.calls()
  start = time.monotonic()
  code, lines = ready.run()
  assert time.monotonic() - start < 2
  assert code == 0
  assert len(lines) == 1
  assert lines[0].startswith('Nothing to do')
  assert ready.run('--quiet') == (0, [])
  (tmp_path / 'a link').symlink_to(ready.root)
  assert ready.run(script=tmp_path / 'a link' / 'scripts' / 'setup.sh') == (0, lines)
  (tmp_path / 'script link').symlink_to(ready.root / 'scripts' / 'setup.sh')
  assert ready.run(script=tmp_path / 'script link') == (0, lines)
  assert ready.calls() == []


@pytest.mark.parametrize('changed', ['requirements.lock', 'setup.py', 'deepseek_jax/__init__.py'])
def test_a_change_installs_again_in_place(ready, changed):
  ready.calls()
  mine = ready.root / '.venv' / 'mine'
  mine.touch()
  with (ready.root / changed).open('a') as file:
    file.write("__version__ = '0.2.0'\n")
  code, _ = ready.run()
  assert code == 0
  assert len(ready.calls()) == 3
  assert mine.exists()
  assert ready.run()[1][0].startswith('Nothing to do')


def test_a_moved_clone_makes_its_environment_anew(ready, tmp_path):
  ready.root = ready.root.rename(tmp_path / 'moved')
  code, lines = ready.run(PYTHON=str(ready.bin / 'python3.13'))
  assert code == 0
  assert 'another place' in lines[0]


def test_a_failed_download_is_tried_again(clone):
  clone.program('python3.13', FAKE_PYTHON)
  (clone.fake / 'failures').write_text('3')
  code, _ = clone.run()
  assert code == 0
  assert (clone.fake / 'pauses').read_text().split() == ['2', '6', '18']


def test_giving_up_says_what_failed_and_the_next_run_repairs(clone):
  python = clone.program('python3.13', FAKE_PYTHON)
  (clone.fake / 'failures').write_text('99')
  code, lines = clone.run('--quiet')
  assert code != 0
  assert 'the network is down' in lines
  assert 'installing the locked packages failed' in lines[-1]
  assert len(clone.calls()) == 4
  (clone.fake / 'failures').unlink()
  code, lines = clone.run(PYTHON=str(python))
  assert code == 0
  assert 'did not finish' in lines[0]


def test_a_killed_set_up_is_repaired_by_the_next(clone):
  python = clone.program('python3.13', FAKE_PYTHON)
  process = clone.start_hanging()
  os.killpg(process.pid, signal.SIGKILL)
  process.communicate()
  half_made = clone.root / '.venv' / 'half made'
  half_made.touch()
  (clone.fake / 'hang').unlink()
  code, lines = clone.run(PYTHON=str(python))
  assert code == 0
  assert 'did not finish' in lines[0]
  assert not half_made.exists()
  assert clone.run()[1][0].startswith('Nothing to do')


def test_two_at_once_install_once(clone):
  clone.program('python3.13', FAKE_PYTHON)
  first = clone.start_hanging()
  second = clone.start()
  assert 'waiting' in second.stdout.readline()
  (clone.fake / 'hang').unlink()
  outputs = [run.communicate(timeout=120)[0] for run in (first, second)]
  assert (first.returncode, second.returncode) == (0, 0), outputs
  assert 'Nothing to do' in outputs[1]
  assert len(clone.calls()) == 3


def test_an_environment_made_by_hand_is_used_or_left_alone(clone):
  clone.program('python3.13', FAKE_PYTHON)
  venv = clone.root / '.venv'
  subprocess.run([BASE_PYTHON, '-I', '-m', 'venv', '--without-pip', venv], check=True)
  code, lines = clone.run()
  assert code != 0
  assert len(lines) == 1
  assert 'move it away or delete it' in lines[0]
  assert (venv / 'pyvenv.cfg').exists()
  (site,) = venv.glob('lib/python*/site-packages')
  shutil.copytree(clone.fake / 'pip', site / 'pip')
  code, lines = clone.run()
  assert code == 0
  assert (
    len(clone.calls()) == 4
  )  # the question whether there is a pip, and the three of every set-up


def test_extras_keep_the_locked_versions_and_are_remembered(ready):
  ready.calls()
  assert ready.run('--extras=torch')[0] != 0
  assert ready.run('--extras=tpu,notebook')[0] == 0
  (call,) = [line for line in ready.calls() if '--constraint' in line]
  assert call.endswith(f'{ready.root}[tpu,notebook]')
  constraints = pathlib.Path(re.search(r'--constraint (.*) --editable', call).group(1))
  assert constraints.read_text() == 'example==1.0\n'
  assert ready.run('--extras=tpu')[1][0].startswith('Nothing to do')
  with (ready.root / 'requirements.lock').open('a') as file:
    file.write('another==2.0 \\\n    --hash=sha256:11\n')
  assert ready.run()[0] == 0
  assert any('[tpu,notebook]' in line for line in ready.calls())


def metadata() -> dict:
  setuptools = pytest.importorskip('setuptools')
  found = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setuptools, 'setup', lambda **arguments: found.update(arguments))
    patch.chdir(ROOT)
    runpy.run_path(str(ROOT / 'setup.py'))
  return found


def test_the_lock_holds_everything_that_setup_asks_for():
  requirements = pytest.importorskip('packaging.requirements')
  utilities = pytest.importorskip('packaging.utils')
  text = (ROOT / 'requirements.lock').read_text()
  pins = dict(re.findall(r'^([A-Za-z0-9._-]+)==([^ ;\\]+)', text, flags=re.MULTILINE))
  entries = re.split(r'^(?=[A-Za-z])', text, flags=re.MULTILINE)[1:]
  assert len(entries) == len(pins)
  assert all('--hash=sha256:' in entry for entry in entries)
  assert '://' not in text
  assert 'torch' not in pins
  asked = metadata()
  for line in asked['install_requires'] + asked['extras_require']['dev']:
    requirement = requirements.Requirement(line)
    pinned = pins[utilities.canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned), line


def test_every_folder_of_modules_is_packaged():
  package = ROOT / 'deepseek_jax'
  folders = {path.parent.relative_to(ROOT) for path in package.rglob('*.py')}
  assert {'.'.join(folder.parts) for folder in folders} == set(metadata()['packages'])


def test_the_image_is_built_by_the_set_up_alone():
  text = re.sub(r'^#.*\n', '', (ROOT / 'Dockerfile').read_text(), flags=re.MULTILINE)
  assert text.count('RUN scripts/setup.sh\n') == 2
  assert not re.search(r'\b(pip install|apt-get|curl|wget)\b', text)
  copied = [line for line in text.splitlines() if line.startswith('COPY')]
  for line in copied[:-1]:
    for name in line.split()[2:-1]:
      assert (ROOT / name).is_file(), name
