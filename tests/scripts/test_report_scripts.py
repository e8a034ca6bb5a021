"""report.py, compare.py and plot_run.py from their command lines, in this process."""

import pytest

from scripts import launch


@pytest.fixture
def call(run_script):
  """Runs a script as `__main__`; returns exit code, output and errors."""

  def run(script: str, *arguments: str) -> tuple[int, str, str]:
    ended = run_script(script, *arguments)
    return ended.code, ended.output, ended.errors

  return run


def test_a_report_on_demand(call, write_run):
  path = write_run('run', changes={'seed': 3})
  code, out, errors = call('report', f'--workdir={path}')
  assert (code, out, errors) == (0, f'{path / "report.html"}\n', '')
  text = (path / 'report.html').read_text()
  assert 'What differs from the file of &#x27;tiny_mla&#x27;' in text
  code, *_ = call('report', f'--workdir={path}', '--config=tiny_window')
  assert code == 0
  assert 'the file of &#x27;tiny_window&#x27;' in (path / 'report.html').read_text()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], '--workdir is missing'),
    (['--workdir=nowhere'], 'no run here'),
    (['--workdir=nowhere', '--config.seed=2'], 'changes nothing'),
    (['--workdir=nowhere', 'more'], 'unexpected argument'),
  ],
)
def test_a_report_of_nothing_is_one_message(call, arguments, message):
  code, out, errors = call('report', *arguments)
  assert (code, out) == (2, '')
  assert errors.startswith('error: ')
  assert message in errors
  assert 'Traceback' not in errors


def test_a_comparison(call, write_run, tmp_path):
  one, two = write_run('one'), write_run('two', changes={'model.depth': 5})
  page = tmp_path / 'pages' / 'compare.html'
  code, out, errors = call('compare', str(one), str(two), f'--out={page}')
  assert (code, errors) == (0, '')
  assert 'model.depth' in out
  assert str(page) in out
  assert page.read_text().startswith('<!doctype html>')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [([], 'two or more'), (['a'], 'two or more'), (['a', 'b'], 'no run'), (['--config=a'], '--help')],
)
def test_a_comparison_of_nothing_is_one_message(call, arguments, message):
  code, out, errors = call('compare', *arguments)
  assert (code, out) == (2, '')
  assert message in errors
  assert 'Traceback' not in errors


def test_a_run_is_plotted(call, write_run):
  path = write_run('run', evaluations=[{'step': 20, 'bits_per_byte': 1.5}], yardsticks={'xz': 2.4})
  code, out, _ = call('plot_run', f'--workdir={path}')
  assert code == 0
  assert out.split() == [str(path / 'run.png'), str(path / 'run.svg')]
  assert 'xz  2.40' in (path / 'run.svg').read_text()


def test_a_report_that_fails_is_a_warning(write_run, capsys):
  path = write_run('run')
  launch.try_report(path, 'tiny_mla', None)
  assert capsys.readouterr().out == f'report: {path / "report.html"}\n'
  (path / 'report.html').unlink()
  (path / 'report.html.new').mkdir()
  launch.try_report(path, 'tiny_mla', 'configs/tiny_mla.py')
  out, errors = capsys.readouterr()
  assert out == ''
  assert errors.startswith('warning: no report was drawn (IsADirectoryError')
  assert f'python scripts/report.py --workdir={path} --config=configs/tiny_mla.py' in errors


def test_a_name_is_not_a_path():
  assert launch.named_config('tiny_mla').name == 'tiny_mla'
  for name in ('nowhere', '../configs/tiny_mla', '__init__', '', 'a b'):
    assert launch.named_config(name) is None, name


def test_a_placement_planned_from_a_log(call, write_run):
  path = write_run('run', rows=20)
  numbers = ['--devices=2', '--slots=6', '--window=3']
  code, out, errors = call('plan_placement', str(path), *numbers, '--start=3')
  assert (code, errors) == (0, '')
  firsts = [line.split()[0] for line in out.splitlines()[1:]]
  assert firsts == ['layer', 'layers/1', 'layers/2', 'mean']
  for arguments, message in (
    ([], 'expected the folder of a run'),
    ([str(path), '--devices=2'], '--slots is missing'),
    ([str(path), *numbers, '--start=17'], 'run: found 4 rows with a load'),
  ):
    code, out, errors = call('plan_placement', *arguments)
    assert (code, out) == (2, '')
    assert message in errors
