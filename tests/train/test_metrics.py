"""What a run writes down: JSON lines, TensorBoard, and the terminal; and how it is timed."""

import io
import json
import math
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from tensorboardX.proto import event_pb2

from deepseek_jax.core.config import ConfigError
from deepseek_jax.train import throughput
from deepseek_jax.train.display import (
  LineDisplay,
  LiveDisplay,
  QuietDisplay,
  format_count,
  format_line,
  format_seconds,
  load_bars,
  make_display,
)
from deepseek_jax.train.metrics import JsonLines, MetricWriter
from scripts import plot_run

METRICS = {
  'loss': 4.8123,
  'bits_per_byte': np.float32(1.7),
  'grad_norm': jnp.float32(0.93),
  'learning_rate': 3e-4,
  'tokens_per_second': 5123.0,
  'mfu': 0.412,
  'seconds_left': 192.3,
  'peak_memory_bytes': 1_900_000_000,
  'load': {'layers/1': np.array([0.25, 0.75]), 'layers/2': [0.5, 0.5]},
  'max_violation': np.array([0.5, 0.0]),
}
LINE = (
  'step  120/2000    6.0%  loss  4.812  bits/byte  1.70  grad  0.93  lr 3.0e-04  '
  'tok/s  5.1k  mfu  41%  left  3m12s  mem  1.9 GB'
)


def read_events(workdir):
  """Every (step, tag, kind, value) that TensorBoard would read, and the purge marks."""
  found, purges = [], []
  for path in sorted((workdir / 'tensorboard').iterdir()):
    data = path.read_bytes()
    at = 0
    while at < len(data):
      size = int.from_bytes(data[at : at + 8], 'little')
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
      at += 12 + size + 4
      if event.HasField('session_log'):
        purges.append(event.step)
      for value in event.summary.value:
        kind = value.WhichOneof('value')
        found.append((event.step, value.tag, kind, getattr(value, kind)))
  return found, purges


def test_rows_are_plain_json(tmp_path):
  lines = JsonLines(tmp_path / 'deep' / 'rows.jsonl')
  assert lines.read() == []
  lines.append({'step': np.int64(1), 'a': np.float32(0.5), 'b': jnp.arange(3), 'c': float('nan')})
  lines.append({'step': 2, 'a': {'x': [1.0, -math.inf]}, 'text': 'wörds\n', 'flag': np.bool_(True)})
  rows = lines.read()
  assert rows == [
    {'step': 1, 'a': 0.5, 'b': [0, 1, 2], 'c': None},
    {'step': 2, 'a': {'x': [1.0, None]}, 'text': 'wörds\n', 'flag': True},
  ]
  strict = [
    json.loads(line, parse_constant=lambda name: pytest.fail(name))
    for line in lines.path.read_text().splitlines()
  ]
  assert strict == rows
  with pytest.raises(KeyError):
    lines.append({'a': 1})


def test_truncate_drops_later_rows_and_a_torn_line(tmp_path):
  lines = JsonLines(tmp_path / 'rows.jsonl')
  assert lines.truncate(3) == 0
  assert not lines.path.exists()
  for step in range(1, 7):
    lines.append({'step': step, 'loss': step / 3})
  with lines.path.open('a') as file:
    file.write('{"step": 7, "lo')
  assert [row['step'] for row in lines.read()] == [1, 2, 3, 4, 5, 6]
  assert lines.truncate(4) == 2
  lines.append({'step': 5, 'loss': 9.0})
  assert [(row['step'], row['loss']) for row in lines.read()] == [
    *((step, step / 3) for step in range(1, 5)),
    (5, 9.0),
  ]
  with lines.path.open('a') as file:
    file.write('[1]\n')
  with pytest.raises(ConfigError, match=r'rows\.jsonl:6: expected a JSON object'):
    lines.read()


def test_the_writer_writes_everywhere(tmp_path):
  stream = io.StringIO()
  before = set(threading.enumerate())
  with MetricWriter(tmp_path, LineDisplay(2000, stream=stream)) as writer:
    writer.write(120, METRICS)
    writer.write(121, {'loss': float('nan'), 'load': {'layers/1': [float('nan'), 1.0]}})
    writer.write_scalars(121, 'held_out', {'loss': 2.5})
  # What is left behind must not hold up the end of the process.
  assert all(thread.daemon for thread in threading.enumerate() if thread not in before)
  rows = JsonLines(tmp_path / 'metrics.jsonl').read()
  assert rows[0]['load'] == {'layers/1': [0.25, 0.75], 'layers/2': [0.5, 0.5]}
  assert rows[0]['max_violation'] == [0.5, 0.0]
  assert rows[1] == {'step': 121, 'loss': None, 'load': {'layers/1': [None, 1.0]}}
  first, second = stream.getvalue().splitlines()
  assert first == LINE
  assert re.fullmatch(r'step  121/2000 +6\.\d%  loss    nan', second)
  events, purges = read_events(tmp_path)
  scalars = {(step, tag): value for step, tag, kind, value in events if kind == 'simple_value'}
  assert scalars[120, 'loss'] == pytest.approx(4.8123)
  assert scalars[120, 'max_violation/00'] == 0.5
  assert scalars[121, 'held_out/loss'] == 2.5
  assert (121, 'loss') not in scalars
  histograms = {(step, tag): value for step, tag, kind, value in events if kind == 'histo'}
  assert set(histograms) == {(120, 'load/layers/1'), (120, 'load/layers/2')}
  assert histograms[120, 'load/layers/1'].max == 0.75
  assert purges == []


def test_resuming_forgets_what_came_later(tmp_path):
  with MetricWriter(tmp_path, QuietDisplay()) as writer:
    for step in range(1, 6):
      writer.write(step, {'loss': float(step)})
  with MetricWriter(tmp_path, QuietDisplay()) as writer:
    assert writer.truncate(3) == 2
    writer.write(4, {'loss': 40.0})
    with pytest.raises(ConfigError, match='before the first write'):
      writer.truncate(3)
  assert [row['loss'] for row in writer.rows.read()] == [1, 2, 3, 40]
  assert read_events(tmp_path)[1] == [4]


def test_plain_lines_come_at_their_cadence():
  stream = io.StringIO()
  display = LineDisplay(23, every_steps=10, stream=stream)
  for step in range(3, 24):
    display.update(step, {'loss': 1.0})
  display.message('held out 1.90')
  display.close()
  lines = stream.getvalue().splitlines()
  assert [line.split('/')[0].split()[1] for line in lines[:-1]] == ['3', '10', '20', '23']
  assert lines[-1] == 'held out 1.90'
  assert len({len(line) for line in lines[:-1]}) == 1


def test_numbers_fit_their_columns():
  counts = {
    0: '0',
    7.4: '7',
    999: '999',
    999.6: '1.0k',
    5123: '5.1k',
    99_960: '100k',
    2.5e9: '2.5G',
  }
  assert {value: format_count(value) for value in counts} == counts
  seconds = {0.4: '0s', 59.6: '1m00s', 192: '3m12s', 3600: '1h00m', 7500: '2h05m', 270_000: '3d03h'}
  assert {value: format_seconds(value) for value in seconds} == seconds
  assert format_line(5, 10, {}) == 'step  5/10   50.0%'


def test_load_bars_show_equal_busy_and_dead_experts():
  assert load_bars([0.25] * 4) == '▅▅▅▅'
  assert load_bars([0.0, 1.0, 0.0, 0.0]) == '·█··'
  assert load_bars([None, 0.5]) == '·▅'
  assert len(load_bars([1 / 256] * 256)) == 64
  assert set(load_bars([1 / 256] * 256)) == {'▅'}
  assert len(load_bars([1 / 100] * 100)) == 50


def test_the_live_panel_shows_numbers_and_loads():
  stream = io.StringIO()
  console = rich.console.Console(file=stream, force_terminal=True, width=120, height=40)
  display = LiveDisplay(2000, 'first', console)
  display.message('before')
  load = {f'layers/{i}': [1 / 4 + i / 100, 1 / 4, 1 / 4, 1 / 4 - i / 100] for i in range(20)}
  display.update(120, METRICS | {'load': load, 'mfu': None})
  display.message('[held out] 1.90')
  display.close()
  text = re.sub(r'\x1b\[[0-9;?]*[A-Za-z]', '', stream.getvalue())
  for part in ('first', '120/2000', '4.812', '5.1k', 'nan', 'layers/19', '[held out] 1.90'):
    assert part in text, part
  assert '12 most uneven of 20 layers' in text
  assert 'layers/3 ' not in text
  display.close()


def test_the_display_suits_the_stream(capsys):
  assert isinstance(make_display(10), LineDisplay)
  assert isinstance(make_display(10, kind='quiet'), QuietDisplay)
  assert isinstance(make_display(10, kind='live'), LiveDisplay)
  make_display(10).message('x')
  make_display(10, kind='quiet').message('y')
  make_display(10, kind='quiet').update(1, METRICS)
  assert capsys.readouterr().out == 'x\n'


def test_the_clock_times_finished_steps_only():
  time = [0.0]
  clock = throughput.Clock(tokens_per_step=100, window=3, now=lambda: time[0])
  assert clock.step_seconds is clock.tokens_per_second is clock.seconds_left(10) is None
  time[0] = 60.0  # compilation and the first step
  clock.tick(1)
  assert clock.step_seconds is None
  time[0] += 2.0
  clock.tick(2)
  assert (clock.step_seconds, clock.tokens_per_second, clock.seconds_left(12)) == (2.0, 50.0, 20.0)
  with clock.pause():
    time[0] += 500.0
  time[0] += 8.0
  clock.tick(6)
  assert clock.step_seconds == 2.0
  for seconds in (4.0, 5.0, 100.0):
    time[0] += seconds
    clock.tick(clock._mark[0] + 1)
  assert clock.step_seconds == 5.0
  assert clock.seconds_left(5) == 0


def test_memory_is_counted_in_bytes():
  before = throughput.peak_memory_bytes()
  assert 50e6 < before < 1e12
  block = np.ones(40_000_000)
  assert throughput.peak_memory_bytes() >= max(before, block.nbytes)


def test_the_matmul_peak_is_plausible(monkeypatch):
  monkeypatch.setattr(throughput, '_HOST_SIZES', (128, 256))
  assert 1e8 < throughput.measure_matmul_peak('float32', 0.02) < 1e14


@pytest.mark.parametrize(
  ('slow', 'expected'), [('float32', 'bfloat16'), ('bfloat16', 'float32'), ('neither', 'float32')]
)
def test_the_faster_precision_is_chosen(monkeypatch, slow, expected):
  seen = set()

  def fake(programs, budget):
    operands = [operands for _, operands in programs]
    seen.update(str(array.dtype) for group in operands for array in group)
    return [2.0 if str(group[0].dtype) == slow else 1.0 for group in operands]

  monkeypatch.setattr(throughput, '_best_seconds', fake)
  name, rates = throughput.fastest_precision()
  assert name == expected
  assert seen == set(rates) == {'float32', 'bfloat16'}
  assert set(rates['float32']) == {'forward', 'input_gradient', 'weight_gradient', 'all'}


def test_timed_products_are_those_of_a_training_step(monkeypatch):
  """Each layout computes what autodiff of x·w would."""
  for name, size in (('_DENSE', (3, 4, 5)), ('_EXPERTS', (2, 3, 4, 5)), ('_VOCABULARY', (6, 4, 7))):
    monkeypatch.setattr(throughput, name, size)
  assert throughput._layout_flops() == 2 * (60 + 120 + 168)
  x, w, *_ = throughput._training_operands('forward', 'float32')
  outputs, pullback = jax.vjp(lambda x, w: throughput._forward(x, w)[0], x, w)
  dx, dw = pullback(jnp.full(outputs.shape, 0.5))
  for layout, expected in (('input_gradient', dx), ('weight_gradient', dw)):
    operands = throughput._training_operands(layout, 'float32')
    np.testing.assert_allclose(throughput._LAYOUTS[layout](*operands)[0], expected)
  assert throughput._best_seconds([(jnp.dot, (x, w))], 0.0)[0] > 0


def test_the_picture_shows_curve_yardsticks_and_loads(tmp_path):
  with pytest.raises(ConfigError, match='no run here'):
    plot_run.draw_run(tmp_path, 'empty')
  rows = JsonLines(tmp_path / 'metrics.jsonl')
  rows.append({'step': 1, 'loss': math.nan})
  with pytest.raises(ConfigError, match='finite loss'):
    plot_run.draw_run(tmp_path, 'diverged')
  rows.append({'step': 5, 'loss': 3.0})
  assert len(plot_run.draw_run(tmp_path, 'first').axes) == 1
  load = {'layers/10': [0.5, 0.5, 0.0], 'layers/2': [0.25, 0.75]}
  rows.append({'step': 9, 'bits_per_byte': 2.0, 'loss': 2.5, 'load': load})
  figure = plot_run.draw_run(tmp_path, 'one load')
  for step in range(10, 40):
    rows.append({'step': step, 'bits_per_byte': 1.5 + 1 / step, 'loss': 2.0, 'load': load})
  JsonLines(tmp_path / 'evaluations.jsonl').append({'step': 30, 'bits_per_byte': 1.625})
  (tmp_path / 'yardsticks.json').write_text('{"gzip -9": 3.0, "xz -9e": 2.95}')
  figure = plot_run.draw_run(tmp_path, 'all')
  figure.savefig(tmp_path / 'run.svg')
  text = (tmp_path / 'run.svg').read_text()
  for part in ('gzip -9  3.00', 'xz -9e  2.95', '1.62', 'layer (3 experts each)', '0  dead'):
    assert f'<!-- {part} -->' in text, part
  assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ['2', '10']


def test_the_load_table_is_relative_to_an_equal_share():
  rows = [
    {'step': 1, 'load': {'layers/1': [0.25, 0.75]}},
    {'step': 2},
    {'step': 3, 'load': {'layers/1': [0.5, None], 'layers/0': [1.0]}},
  ]
  layers, steps, table = plot_run.load_table(rows)
  assert layers == ['layers/0', 'layers/1']
  np.testing.assert_array_equal(steps, [1, 3])
  np.testing.assert_array_equal(
    table, [[[math.nan, 1.0], [math.nan, math.nan]], [[0.5, 1.0], [1.5, math.nan]]]
  )
