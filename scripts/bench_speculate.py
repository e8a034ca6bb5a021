"""Times greedy decoding of a trained run one token a step, and with drafts of its own MTP modules.

  python scripts/train.py --config=tiny_mla --workdir=runs/drafts --config.train_steps=600
  python scripts/bench_speculate.py --workdir=runs/drafts

Both continue the same held-out texts, by turns, and must give the same tokens; medians of the
rounds count. What a step costs decides: where reading the weights is what takes the time, a step
with drafts costs little more than one without; on a CPU that computes, it costs its FLOPs. Run it
on a machine that does nothing else.
"""

import statistics
import time
from typing import Any

from absl import flags

from scripts import launch

USAGE = __doc__ or ''
WORKDIR = flags.DEFINE_string('workdir', None, 'a run with MTP, or a published folder')
TOKENS = flags.DEFINE_integer('tokens', 96, 'tokens that are added', lower_bound=2)
CONTEXT = flags.DEFINE_integer('context', 32, 'tokens of a prompt', lower_bound=1)
BATCHES = flags.DEFINE_list('batches', ['1', '8'], 'prompts side by side')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'rounds that count', lower_bound=1)
DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], "None takes the run's")


def main() -> None:
  """Runs the script."""
  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.hub import from_pretrained

  if WORKDIR.value is None:
    raise ConfigError('--workdir is missing; for example --workdir=runs/drafts')
  model = from_pretrained(WORKDIR.value, dtype=DTYPE.value)
  for batch in BATCHES.value:
    print(line_of(model, int(batch)), flush=True)


def line_of(model: Any, batch: int) -> str:
  """Returns the line of one number of prompts: both speeds, their ratio, and how drafts did."""
  from deepseek_jax.infer.generate import stream
  from deepseek_jax.infer.prompt import by_row
  from deepseek_jax.infer.speculate import SpeculativeStream

  prompts = heldout(model, batch)
  arguments = (model.decoder, model.variables, prompts)
  seconds: dict[str, list[float]] = {'alone': [], 'drafts': []}
  rows: dict[str, Any] = {}
  for round_ in range(ROUNDS.value + 1):
    for name, kind in (('alone', stream), ('drafts', SpeculativeStream)):
      pairs: Any = kind(*arguments, max_new_tokens=TOKENS.value)
      first = next(pairs)  # what reads the prompts is not what is compared
      start = time.perf_counter()
      rows[name] = by_row((first, *pairs), batch)
      if round_:  # the first compiles
        seconds[name].append(time.perf_counter() - start)
      if name == 'drafts':
        acceptance = pairs.acceptance  # the same in every round
  same = sum(mine == other for mine, other in zip(rows['alone'], rows['drafts'], strict=True))
  count = batch * (TOKENS.value - 1)
  ratios = [a / b for a, b in zip(seconds['alone'], seconds['drafts'], strict=True)]
  alone, drafts = (count / statistics.median(times) for times in seconds.values())
  return (
    f'batch {batch:3}: {drafts:7.1f} tokens/s with drafts, {alone:7.1f} alone = '
    f'{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}); '
    f'{acceptance.rate:.0%} of the drafts stood, {acceptance.tokens_per_step:.2f} tokens a step; '
    f'{same} of {batch} rows are the same'
  )


def heldout(model: Any, batch: int) -> list[list[int]]:
  """Returns beginnings of held-out rows of the run's own data."""
  import numpy as np

  from deepseek_jax.data.packed_split import heldout_batches

  data = model.experiment.data.prepare(launch.cache_dir(None))
  found: list[list[int]] = []
  for part in heldout_batches(data.heldout, 8):
    tokens, segments = np.asarray(part.tokens), np.asarray(part.segments)
    for row, segment in zip(tokens, segments, strict=True):
      first = row[segment == segment[0]]  # one document, from its beginning in this row
      if len(first) >= CONTEXT.value:
        found.append([int(token) for token in first[: CONTEXT.value]])
      if len(found) == batch:
        return found
  raise SystemExit(f'{len(found)} held-out rows have {CONTEXT.value} tokens; expected {batch}')


if __name__ == '__main__':
  launch.run(main, USAGE)
