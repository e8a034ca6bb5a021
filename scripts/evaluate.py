"""Measures a trained model on held-out text, beside compressors and n-gram models."""

import pathlib
from typing import Any

from absl import flags

from scripts import launch

USAGE = """
Measures a trained model on held-out text.

  python scripts/evaluate.py --workdir=runs/first [--step=300]

  --workdir=DIR           the folder of a run
  --step=N                a checkpoint other than the newest
  --weights=averaged|raw  which weights (default: the averaged ones where the run keeps any)
  --yardsticks=false      leaves out gzip, xz and the n-gram models
  --cache_dir=DIR         tokens and pack plans (default: ~/.cache/deepseek_jax)

Prints bits per byte of the whole held-out text, and what five yardsticks need for the same text.
For a run on captioned pictures: how well held-out captions are predicted from their own picture and
from another one, and how many keywords of the model's own captions are right.
For a run on media: how many held-out documents greedy decoding would write to the letter, and nats
a token, with their own media and with those of another row, and how well the words of greedy
answers agree with the true ones, by source; of two towers, how often media find their text. The
figures are in media.json, the answers in answers.json, which scripts/plot_media.py draws.
For a run that learns to recall: how many answers are right, by how far back they lie.
"""

WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run')
STEP = flags.DEFINE_integer('step', None, 'checkpoint; the newest by default')
WEIGHTS = flags.DEFINE_enum('weights', None, ['averaged', 'raw'], 'averaged where there are any')
YARDSTICKS = flags.DEFINE_bool('yardsticks', True, 'compare with compressors and n-gram models')
CACHE_DIR = flags.DEFINE_string('cache_dir', None, 'folder for tokens and pack plans')


def main() -> None:
  """Runs the script."""
  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.data.captions import CaptionData
  from deepseek_jax.data.media.rows import MediaData
  from deepseek_jax.data.recall import RecallData
  from deepseek_jax.infer.caption_score import measure_captions
  from deepseek_jax.infer.media_score import measure_media
  from deepseek_jax.lab.recall import recall_by_distance, recall_table
  from deepseek_jax.train.checkpoint_reader import saved_steps, whole_step
  from deepseek_jax.train.evaluate import evaluate
  from deepseek_jax.train.step import build_program
  from deepseek_jax.train.workdir import Workdir, write_json

  if WORKDIR.value is None:
    raise ConfigError('--workdir is missing; for example --workdir=runs/first')
  workdir = Workdir(pathlib.Path(WORKDIR.value))
  experiment = workdir.read()
  if experiment is None:
    raise ConfigError(f'{workdir.path}: no run here (there is no config.json)')
  if not saved_steps(workdir.checkpoints):
    raise ConfigError(f'{workdir.checkpoints}: no checkpoint; the run has not saved one yet')
  step = whole_step(workdir.checkpoints, STEP.value)
  weights: Any = WEIGHTS.value
  program = build_program(experiment)
  variables = placed_weights(program, workdir.checkpoints / str(step), weights)
  params, buffers = variables['params'], variables['buffers']
  cache = launch.cache_dir(CACHE_DIR.value)
  data = experiment.data.prepare(cache)
  name = f'{experiment.name}, step {step}'
  if isinstance(data, RecallData):
    result = evaluate(program, params, buffers, data.heldout)
    print(
      f'{name}: {result.accuracy:.1%} of {result.targets:,} answers right, {result.loss:.4f} nats '
      f'an answer\n\n{recall_table(recall_by_distance(program.decoder, variables, data))}'
    )
    return
  if isinstance(data, CaptionData):
    figures = measure_captions(program.decoder, variables, data)
    write_json(workdir.path / 'captions.json', {'step': step, **figures})
    print(caption_report(name, figures))
    return
  if isinstance(data, MediaData):
    figures, written = measure_media(program.decoder, variables, data)
    write_json(workdir.path / 'media.json', {'step': step, 'sources': figures})
    write_json(workdir.path / 'answers.json', {'step': step, 'answers': written})
    print(media_report(name, figures))
    return
  evaluate_text(name, evaluate(program, params, buffers, data.heldout), data, workdir, cache)


def placed_weights(program: Any, path: pathlib.Path, weights: Any) -> dict[str, Any]:
  """Returns `params` and `buffers` of a checkpoint, laid out as the program has them."""
  import jax

  from deepseek_jax.core.serialise import from_json
  from deepseek_jax.hub.pretrained import regrouped
  from deepseek_jax.train.checkpoint_reader import read_params, require_equal_trees

  params, buffers, config = read_params(path, weights)
  state = program.abstract_state
  # A run may go on with a rematerialisation, or stages, that group the layers in another way.
  found = regrouped(
    {'params': params, 'buffers': buffers}, from_json(config).segments, program.experiment.segments
  )
  like = {'params': state.params, 'buffers': state.buffers}
  require_equal_trees(path, found, like)
  return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), found, like)


def evaluate_text(name: str, result: Any, data: Any, workdir: Any, cache: pathlib.Path) -> None:
  """Prints a model's figures on text beside what compressors and counting models reach."""
  from deepseek_jax.data.yardstick import yardsticks
  from deepseek_jax.train.workdir import write_json

  # They know nothing of prompts, which are given to the model and not counted.
  figures = yardsticks(data, cache) if YARDSTICKS.value and not data.heldout.prompted else {}
  if figures:
    write_json(workdir.path / 'yardsticks.json', figures)
  print(report(name, result.bits_per_byte, figures))
  print(
    f'{data.heldout.text_bytes:,} bytes of {data.heldout.documents} held-out documents, '
    f'{result.targets:,} tokens, {result.loss:.4f} nats a token, '
    f'{result.accuracy:.1%} of them found likeliest'
  )
  if result.mtp_acceptance is not None:
    print(
      f'MTP: {result.mtp_loss:.4f} nats a token further ahead; its choice of the second token is '
      f"the model's own in {result.mtp_acceptance:.1%} of places"
    )


def caption_report(name: str, figures: dict[str, Any]) -> str:
  """Returns the figures of a model that describes pictures, as lines."""
  from deepseek_jax.core.describe import table

  nats, f1 = figures['nats_per_token'], figures['keyword_f1']
  rows = [
    ('own picture', f'{nats["own"]:.4f}', f'{f1["own"]:.4f}'),
    ('another picture', f'{nats["shuffled"]:.4f}', f'{f1["shuffled"]:.4f}'),
    (
      'gap',
      f'{nats["gap"]:.4f} ± {nats["gap_error"]:.4f}',
      f'{f1["gap"]:.4f} ± {f1["gap_error"]:.4f}',
    ),
    ('the best single caption', '', f'{f1["constant"]:.4f}'),
  ]
  lines = table(rows, (name, 'nats a token of the caption', 'keyword F1 of greedy captions'))
  return (
    f'{lines}\n{figures["pictures"]} held-out pictures of {figures["drawings"]} drawings; '
    '± is the standard error over drawings, by bootstrap'
  )


def media_report(name: str, figures: dict[str, Any]) -> str:
  """Returns the figures of a model that is shown media, by source, as lines."""
  from deepseek_jax.core.describe import table

  columns = list(next(iter(figures.values())))
  rows = [
    (source, *(f'{v:.4f}' if isinstance(v, float) else f'{v:,}' for v in found.values()))
    for source, found in figures.items()
  ]
  return table(rows, (name, *(column.replace('_', ' ') for column in columns)))


def report(name: str, bits_per_byte: float, figures: dict[str, float]) -> str:
  """Returns a table of bits per byte, best first."""
  from deepseek_jax.core.describe import table

  rows: list[Any] = [(f'▶ {name}', bits_per_byte), *figures.items()]
  rows.sort(key=lambda row: row[1])
  lines = [
    (label, f'{value:.4f}', '' if label.startswith('▶') else f'{bits_per_byte - value:+.4f}')
    for label, value in rows
  ]
  return table(lines, ('held-out text', 'bits/byte', 'this model against it'))


if __name__ == '__main__':
  launch.run(main, USAGE)
