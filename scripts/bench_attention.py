"""Times attention against what it could cost, in one run.

  python scripts/bench_attention.py --what=dense [--torch_python=VENV/bin/python]
  python scripts/bench_attention.py --what=window   # a window beside all of the past
  python scripts/bench_attention.py --what=layers   # a layer of each kind; selection is counted
  python scripts/bench_attention.py --what=short    # scores held whole beside a running softmax
  python scripts/bench_attention.py --what=growth   # seconds against T, and the exponent
  python scripts/bench_attention.py --what=long     # one layer, 131,072 tokens, forward + backward

All candidates of a question take turns, round by round, so that they meet the same machine; medians
count, and the spread is that of the ratios of the rounds. Memory is what XLA holds beside arguments
and results; a process of its own tells the peak where that is asked. Run it on a machine that does
nothing else. What is compared stands in scripts/attention_cases.py.
"""

import functools
import math
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import app, flags

from scripts import attention_cases as cases
from scripts.attention_cases import BACKWARD, FORWARD, Ready, Sizes

LENGTHS = flags.DEFINE_list('lengths', None, 'tokens T of a row; each question has its own')
WHAT = flags.DEFINE_enum(
  'what', 'dense', ['dense', 'window', 'short', 'layers', 'growth', 'long'], 'what to time'
)
ROUNDS = flags.DEFINE_integer('rounds', 5, 'rounds that count; medians of them', lower_bound=1)
BATCH = flags.DEFINE_integer('batch', 1, 'rows B', lower_bound=1)
HEADS = flags.DEFINE_integer('heads', 32, 'query heads H', lower_bound=1)
KEY_DIM = flags.DEFINE_integer('key_dim', 96, 'channels of a query or key head', lower_bound=1)
VALUE_DIM = flags.DEFINE_integer('value_dim', 64, 'channels of a value head', lower_bound=1)
SIZE = flags.DEFINE_integer('size', 512, 'tokens in the window', lower_bound=1)
KINDS = flags.DEFINE_list('kinds', None, 'kinds of layers; the first is the base')
TOP_K = flags.DEFINE_integer('top_k', 512, 'keys k a query of sparse kinds', lower_bound=1)
WAYS = flags.DEFINE_list('ways', ['forward', 'with backward'], 'forward, with backward')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'of all arrays')
MEMORY = flags.DEFINE_float(
  'memory', 12.0, 'GB beyond which a candidate is left out', lower_bound=0
)
TORCH_PYTHON = flags.DEFINE_string('torch_python', None, 'interpreter with torch')
WORKER = flags.DEFINE_string('worker', None, 'used by the script itself')
ROOT = pathlib.Path(__file__).resolve().parent.parent


def take_turns(ready: dict[str, Ready]) -> dict[str, list[float]]:
  """Runs the candidates in turn and returns the seconds of each; the first round warms up."""
  import jax

  taken: dict[str, list[float]] = {name: [] for name in ready}
  for _ in range(ROUNDS.value + 1):
    for name, (call, _) in ready.items():
      begin = time.perf_counter()
      found = jax.block_until_ready(call())
      # A peer in another process measures itself.
      spent = found if isinstance(found, float) else time.perf_counter() - begin
      taken[name].append(spent)
  return {name: seconds[1:] for name, seconds in taken.items()}


def compare(title: str, ready: dict[str, Ready], base: str) -> dict[str, list[float]]:
  """Prints the speed of each candidate over that of the base, seconds and memory."""
  taken = take_turns(ready)
  print(f'{title}: speeds by that of {base!r}')
  for name, seconds in taken.items():
    ratios = sorted(b / s for b, s in zip(taken[base], seconds, strict=True))
    quarter = len(ratios) // 4
    spread = f'{ratios[quarter]:.2f}–{ratios[-1 - quarter]:.2f}'
    held = ready[name].held
    memory = '' if held is None else f'{held / 1e6:9.0f} MB'
    print(
      f'  {name:<34} {statistics.median(ratios):6.2f} {spread:>11} '
      f'{1e3 * statistics.median(seconds):10.1f} ms {memory}',
      flush=True,
    )
  return taken


class Torch:
  """torch in a process of its own, which sleeps while others run."""

  def __init__(self, python: str):
    """Starts it."""
    self.process = subprocess.Popen(
      [python, '-m', 'scripts.bench_attention_torch'],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=ROOT,
    )

  def tell(self, command: str) -> float:
    """Returns the seconds that a command took."""
    assert self.process.stdin is not None
    assert self.process.stdout is not None
    self.process.stdin.write(f'{command}\n')
    self.process.stdin.flush()
    answer = self.process.stdout.readline().split()
    if not answer:
      raise SystemExit(f'{self.process.args!r}: ended with code {self.process.wait()}')
    return float(answer[1])

  def close(self) -> None:
    """Ends it."""
    self.process.communicate(timeout=60)


def sizes(length: int) -> Sizes:
  """The sizes that the flags say, of rows of `length` tokens."""
  return Sizes(BATCH.value, length, HEADS.value, KEY_DIM.value, VALUE_DIM.value, DTYPE.value)


def lengths(*default: int) -> list[int]:
  """The lengths that the flags say, or those of the question."""
  return list(default) if LENGTHS.value is None else [int(length) for length in LENGTHS.value]


def time_dense() -> None:
  """Ours beside `jax.nn.dot_product_attention`, and torch's where there is an interpreter."""
  torch = Torch(TORCH_PYTHON.value) if TORCH_PYTHON.value else None
  for length in lengths(512, 2048, 8192):
    size = sizes(length)
    for way in (FORWARD, BACKWARD):
      # Scores, their softmax and the gradient of both, in float32.
      pairs = size.batch * size.heads * length**2 * 4e-9 * (2 if way == FORWARD else 4)
      ready = {'ours': cases.compile_case(cases.blocked(size), way)}
      if pairs <= MEMORY.value:
        ready['jax.nn.dot_product_attention'] = cases.compile_case(cases.jax_dense(size), way)
      else:
        print(f'{length} tokens: jax.nn.dot_product_attention would take {pairs:.0f} GB')
      if torch is not None:
        torch.tell(f'make {" ".join(map(str, size))}')
        command = 'forward' if way == FORWARD else 'backward'
        ready['torch'] = Ready(functools.partial(torch.tell, command))
      base = list(ready)[1] if len(ready) > 1 else 'ours'
      compare(f'{size}, {way}', ready, base)
  if torch is not None:
    torch.close()


def time_short() -> None:
  """The two forms of dense attention: what `blocked.SHORT` decides between."""
  for length in lengths(64, 128, 256, 512, 1024):
    for way in WAYS.value:
      size = sizes(length)
      ready = {
        'scores of a block held whole': cases.blocked_up_to(size, way, length),
        'running softmax': cases.blocked_up_to(size, way, 0),
      }
      compare(f'{size}, {way}', ready, 'scores of a block held whole')


def time_window() -> None:
  """A window beside all of the past."""
  for length in lengths(2048, 8192):
    size = sizes(length)
    for way in (FORWARD, BACKWARD):
      ready = {
        'all of the past': cases.compile_case(cases.blocked(size), way),
        f'window of {SIZE.value}': cases.compile_case(cases.blocked(size, (SIZE.value, 0)), way),
        'the same and 4 sinks': cases.compile_case(cases.blocked(size, (SIZE.value, 4)), way),
      }
      compare(f'{size}, {way}', ready, 'all of the past')


SPARSE = ('MLA', 'DSA shared', 'DSA', 'Gated(Log)', 'Gated(0.3)', 'TopK(32)', 'NSA')
"""Kinds whose layers are compared if none are named."""


def layer(name: str, length: int, way: str) -> Ready:
  """Compiles a layer of a kind.

  Raises:
    SystemExit: there is no such kind.
  """
  known = cases.kinds(HEADS.value, TOP_K.value)
  if name not in known:
    raise SystemExit(f'--kinds: {name!r} is not one of {", ".join(known)}')
  return cases.compile_case(cases.layer(known[name], length, DTYPE.value, way == BACKWARD), way)


def time_layers() -> None:
  """Whole layers of some kinds on one row of tokens."""
  names = KINDS.value or list(SPARSE)
  for length in lengths(8192):
    for way in WAYS.value:
      ready = {name: layer(name, length, way) for name in names}
      title = f'a layer of {HEADS.value} heads, 1 × {length} tokens, {way}'
      compare(title, ready, names[0])


def time_growth() -> None:
  """Seconds of one layer of each kind against T, with the exponent of a power of T that fits."""
  points = lengths(1024, 2048, 4096, 8192, 16384, 32768, 65536)
  for name in KINDS.value or cases.kinds(HEADS.value, TOP_K.value):
    for way in WAYS.value:
      seconds, held = [], []
      for length in points:
        ready = layer(name, length, way)
        seconds.append(statistics.median(take_turns({name: ready})[name]))
        held.append(ready.held or 0)
      row = ' '.join(f'{1e3 * s:9.0f}' for s in seconds)
      print(f'{name:<14} {way:<14} ms {row}  T^{exponent(points, seconds):.2f}')
      row = ' '.join(f'{x / 1e6:9.0f}' for x in held)
      print(f'{"":<14} {"":<14} MB {row}  T^{exponent(points, held):.2f}', flush=True)


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
  """Returns the slope of log value against log length, by least squares; nan of one point."""
  xs, ys = ([math.log(max(x, 1e-9)) for x in row] for row in (lengths, values))
  if len(xs) < 2:
    return math.nan
  return statistics.linear_regression(xs, ys).slope


def time_long() -> None:
  """Each kind in a process of its own: time, and peak memory of the process."""
  for name in KINDS.value or cases.kinds(HEADS.value, TOP_K.value):
    for length in lengths(131072):
      command = [sys.executable, '-m', 'scripts.bench_attention', f'--worker={name}']
      command += [f'--lengths={length}', f'--dtype={DTYPE.value}', f'--heads={HEADS.value}']
      command += [f'--top_k={TOP_K.value}']
      done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=False)
      print(done.stdout.strip() or f'{name}: ended with code {done.returncode}', flush=True)


def work(name: str) -> None:
  """Runs one layer once forward and backward, and prints time and peak."""
  (length,) = lengths()
  ready = layer(name, length, BACKWARD)
  begin = time.perf_counter()
  import jax

  jax.block_until_ready(ready.call())
  seconds = time.perf_counter() - begin
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(
    f'{name:<14} {length} tokens, forward and backward: {seconds:.1f} s; XLA holds '
    f'{(ready.held or 0) / 1e9:.2f} GB, peak of the process {peak / 1e9:.2f} GB'
  )


def main(argv: list[str]) -> None:
  """Answers the question."""
  del argv
  from deepseek_jax.core.allocator import keep_freed_memory

  if WORKER.value:
    work(WORKER.value)
    return
  keep_freed_memory()
  questions = {
    'dense': time_dense,
    'window': time_window,
    'short': time_short,
    'layers': time_layers,
    'growth': time_growth,
    'long': time_long,
  }
  questions[WHAT.value]()


if __name__ == '__main__':
  app.run(main)
