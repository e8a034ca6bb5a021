"""Continues texts with a trained model."""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from scripts import launch

USAGE = """
Continues texts with a trained model.

  python scripts/generate.py --workdir=runs/first --prompt='It was a dark night, and'

  --workdir=DIR           the folder of a run, or of a published model
  --step=N                a checkpoint other than the newest
  --weights=averaged|raw  which weights (default: the averaged ones where the run keeps any)
  --prompt=TEXT           text to continue; may be given several times; else standard input is read
  --tokens=N              most tokens to add (default: 100)
  --temperature=X         above 1 draws more evenly, below 1 more certainly (default: 0.8)
  --top_p=X               the most likely tokens that hold this much probability (default: 0.95)
  --top_k=N               this many most likely tokens
  --min_p=X               tokens at least this many times as likely as the most likely one
  --greedy                always the most likely token
  --stop=TEXT             ends before this text; may be given several times
  --speculate             several tokens a step, drafted by the model's MTP modules
  --seed=N                the same seed gives the same text (default: 0)

One prompt is shown as it is continued; several are continued together and then shown. The speed
goes to standard error.
"""

WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run')
STEP = flags.DEFINE_integer('step', None, 'checkpoint; the newest by default')
WEIGHTS = flags.DEFINE_enum('weights', None, ['averaged', 'raw'], 'averaged where there are any')
PROMPT = flags.DEFINE_multi_string('prompt', [], 'text to continue')
TOKENS = flags.DEFINE_integer('tokens', 100, 'most tokens to add')
TEMPERATURE = flags.DEFINE_float('temperature', 0.8, 'evenness of the draws')
TOP_K = flags.DEFINE_integer('top_k', None, 'keep this many tokens')
TOP_P = flags.DEFINE_float('top_p', 0.95, 'keep this much probability')
MIN_P = flags.DEFINE_float('min_p', None, 'keep tokens this likely, relative to the likeliest')
GREEDY = flags.DEFINE_bool('greedy', False, 'take the most likely token')
STOP = flags.DEFINE_multi_string('stop', [], 'end before this text')
SPECULATE = flags.DEFINE_bool('speculate', False, 'draft with the MTP modules, and verify')
SEED = flags.DEFINE_integer('seed', 0, 'of the draws')


def main() -> None:
  """Runs the script."""
  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.hub import from_pretrained
  from deepseek_jax.infer.generate import OneByOne
  from deepseek_jax.infer.sample import Greedy, Sample, Sampler
  from deepseek_jax.infer.speculate import Speculate

  if WORKDIR.value is None:
    raise ConfigError('--workdir is missing; for example --workdir=runs/first')
  sampler: Sampler = Greedy()
  if not GREEDY.value:
    sampler = Sample(
      temperature=TEMPERATURE.value, top_k=TOP_K.value, top_p=TOP_P.value, min_p=MIN_P.value
    )
  prompts = [check_text('--prompt', text) for text in PROMPT.value] or [read_prompt()]
  weights: Any = WEIGHTS.value
  generator = from_pretrained(pathlib.Path(WORKDIR.value), STEP.value, weights).generator
  decoding = Speculate() if SPECULATE.value else OneByOne()
  generator = dataclasses.replace(generator, decoding=decoding)
  pieces = generator.stream(
    prompts,
    max_new_tokens=TOKENS.value,
    sampler=sampler,
    stop_texts=STOP.value,
    seed=SEED.value,
  )
  show(prompts, pieces)


def read_prompt() -> str:
  """Reads a prompt from standard input, without the newline at its end."""
  if sys.stdin.isatty():
    print('prompt (end with Ctrl-D):', file=sys.stderr)
  return check_text('standard input', sys.stdin.read()).removesuffix('\n')


def check_text(where: str, text: str) -> str:
  """Returns a text of the user's, in which Python marks bytes that are no UTF-8 as surrogates."""
  from deepseek_jax.core.config import ConfigError

  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    at = len(text[: error.start].encode('utf-8'))
    raise ConfigError(f'{where}: not UTF-8 at byte {at}; expected UTF-8 text') from None
  return text


def show(prompts: Sequence[str], pieces: Iterable[Any]) -> None:
  """Prints each prompt with its continuation; one prompt as it goes."""
  alone = len(prompts) == 1
  texts = list(prompts)
  if alone:
    print(prompts[0], end='', flush=True)
  times = []
  for piece in pieces:
    if piece.token is not None:
      times.append(time.perf_counter())
    texts[piece.row] += piece.text
    if alone:
      print(piece.text, end='', flush=True)
  print('' if alone else '\n\n'.join(texts))
  # The first tokens wait for compilation.
  after = len(times) - len(prompts)
  if after > 0:
    seconds = times[-1] - times[len(prompts) - 1]
    speed = f', {after / seconds:.0f} tokens/s after the first' if seconds > 0 else ''
    print(f'{len(times)} tokens{speed}', file=sys.stderr)


if __name__ == '__main__':
  launch.run(main, USAGE)
