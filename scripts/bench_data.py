"""Measures the data pipeline alone: batches a second and host time a batch.

  python scripts/bench_data.py
  python scripts/bench_data.py --length=4096 --batch_size=64 --step_seconds=0.5

`host` is processor time of all threads for one batch. `wait` is how long a training loop that takes
`--step_seconds` for its own work stands still for the next batch, which was read ahead meanwhile.
"""

import pathlib
import statistics
import time
from collections.abc import Iterator

from absl import app, flags

from deepseek_jax.data import Batch, TextCorpus

_LENGTH = flags.DEFINE_integer('length', 512, 'Tokens in a row.', lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 16, 'Rows in a batch.', lower_bound=1)
_BATCHES = flags.DEFINE_integer('batches', 1000, 'Batches to read flat out.', lower_bound=1)
_STEP_SECONDS = flags.DEFINE_float('step_seconds', 0.05, 'Length of a pretended step.')
_CACHE_DIR = flags.DEFINE_string('cache_dir', 'runs/data', 'Folder of tokens and pack plans.')


def _waits(batches: Iterator[Batch], count: int, step_seconds: float) -> list[float]:
  """Seconds that each of `count` steps waits for its batch."""
  waits = []
  for _ in range(count):
    start = time.perf_counter()
    next(batches)
    waits.append(time.perf_counter() - start)
    time.sleep(step_seconds)
  return waits


def main(argv: list[str]) -> None:
  """Prepares the embedded corpus and measures."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  start = time.perf_counter()
  corpus = TextCorpus(length=_LENGTH.value, batch_size=_BATCH_SIZE.value)
  data = corpus.prepare(pathlib.Path(_CACHE_DIR.value))
  print(f'prepare      {time.perf_counter() - start:9.3f} s')
  start = time.perf_counter()
  batches = data.train_batches(0)
  next(batches)
  print(f'first batch  {time.perf_counter() - start:9.3f} s (imports Grain)')

  start, processor = time.perf_counter(), time.process_time()
  for _ in range(_BATCHES.value):
    next(batches)
  seconds = time.perf_counter() - start
  host_seconds = (time.process_time() - processor) / _BATCHES.value
  rate = _BATCHES.value / seconds
  places = rate * _LENGTH.value * _BATCH_SIZE.value
  print(f'flat out     {rate:9,.0f} batches/s, {places:,.0f} tokens/s')
  print(f'host         {1e3 * host_seconds:9.3f} ms/batch (processor time)')

  waits = _waits(batches, 40, _STEP_SECONDS.value)[1:]
  print(
    f'wait         {1e3 * statistics.median(waits):9.3f} ms/batch (median) at steps of '
    f'{1e3 * _STEP_SECONDS.value:g} ms, most {1e3 * max(waits):.3f} ms'
  )


if __name__ == '__main__':
  app.run(main)
