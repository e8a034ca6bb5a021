"""Measures what data of several modalities costs the host.

  python scripts/bench_multimodal.py
  python scripts/bench_multimodal.py --data=five_modalities --workers=2 --step_seconds=1.0

`host` is processor time of making or decoding the media of one batch and putting it together,
measured in this process. `wait` is how long a training loop that takes `--step_seconds` for its own
work stands still for the next batch, which `--workers` processes make meanwhile.
"""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable

import numpy as np
from absl import app, flags

from deepseek_jax.data.media.presets import FIVE_MODALITIES, IMAGE_TEXT, VISUAL_QUESTIONS
from deepseek_jax.data.media.rows import MediaCorpus, MediaData

_PRESETS = {
  'visual_questions': VISUAL_QUESTIONS,
  'image_text': IMAGE_TEXT,
  'five_modalities': FIVE_MODALITIES,
}

_DATA = flags.DEFINE_enum('data', 'five_modalities', list(_PRESETS), 'Which data.')
_WORKERS = flags.DEFINE_integer('workers', 2, 'Grain processes; 0 is threads.', lower_bound=0)
_STEP_SECONDS = flags.DEFINE_float('step_seconds', 1.0, 'Length of a pretended step.')
_BATCHES = flags.DEFINE_integer('batches', 20, 'Batches to measure.', lower_bound=2)
_CACHE_DIR = flags.DEFINE_string('cache_dir', 'runs/data', 'Folder of tokens and plans.')


def _processor_seconds(work: Callable[[int], object], count: int) -> float:
  """Median processor time of `work(0)`, `work(1)`, …"""
  seconds = []
  for number in range(count):
    start = time.process_time()
    work(number)
    seconds.append(time.process_time() - start)
  return statistics.median(seconds)


def _report_sources(data: MediaData) -> None:
  """Prints what one document of each source costs."""
  for source in data.train.sources:
    count = min(50, source.records.count('train'))
    seconds = _processor_seconds(
      lambda number, records=source.records: records.render('train', number),  # type: ignore[misc]
      count,
    )
    print(f'{source.name:12s} {1e3 * seconds:9.3f} ms a document (processor time, median)')


def _report_batches(data: MediaData, config: MediaCorpus) -> None:
  """Prints what a batch costs, and how long a step waits for it."""
  order = np.random.default_rng(0).permutation(data.train.rows)
  size, step = config.batch_size, _STEP_SECONDS.value

  def make(number: int) -> object:
    start = number * size % (len(order) - size)
    return data.train.batch(order[start : start + size])

  host = _processor_seconds(make, _BATCHES.value)
  print(
    f'host         {1e3 * host:9.3f} ms a batch (processor time, median): '
    f'{host / step:.1%} of one core in a step of {step:g} s'
  )
  batches = data.train_batches(0)
  start = time.perf_counter()
  next(batches)
  print(f'first batch  {time.perf_counter() - start:9.3f} s with {config.workers} workers')
  waits = []
  for _ in range(_BATCHES.value):
    time.sleep(step)
    start = time.perf_counter()
    next(batches)
    waits.append(time.perf_counter() - start)
  print(
    f'wait         {1e3 * statistics.median(waits):9.3f} ms a batch (median), at most '
    f'{1e3 * max(waits):.3f} ms: {statistics.median(waits) / step:.2%} of a step'
  )


def main(argv: list[str]) -> None:
  """Prepares the data and measures."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  config = dataclasses.replace(_PRESETS[_DATA.value], workers=_WORKERS.value)
  start = time.perf_counter()
  data = config.prepare(pathlib.Path(_CACHE_DIR.value))
  print(f'prepare      {time.perf_counter() - start:9.3f} s')
  media = ', '.join(f'{kind} {list(shape.values)}' for kind, shape in config.media.items())
  print(f'rows         {data.train.rows} of {config.length}, {data.train.occupancy:.1%} filled')
  print(f'media        {media}')
  _report_sources(data)
  _report_batches(data, config)


if __name__ == '__main__':
  app.run(main)
