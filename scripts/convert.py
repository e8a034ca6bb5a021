"""Turns one of our runs into a folder in the layout of Hugging Face, or the other way round."""

import json
import pathlib
from typing import TYPE_CHECKING, cast

from absl import flags

from scripts import launch

if TYPE_CHECKING:
  from deepseek_jax.train.checkpoint_reader import Weights

USAGE = """
Turns one of our runs into a folder in the layout of Hugging Face, or the other way round.

  python scripts/convert.py --from=runs/quickstart --to=huggingface --out=exported
  python scripts/convert.py --from=exported --to=checkpoint --out=runs/imported

  --from=PATH             a run's workdir, a published folder, or the name of a repository
  --to=huggingface        config.json, *.safetensors with an index, tokenizer.json, SHA256SUMS;
                          weights of multi-token prediction go to ahead.safetensors
  --to=checkpoint         a folder that from_pretrained, generate.py and `init_from` read
  --out=DIR               a new folder, or that of an attempt that was broken off
  --dtype=float32|bfloat16   of the matrices (default: as they are)
  --step=N                a checkpoint other than the newest, where --from is a run
  --weights=averaged|raw  which weights of a run (default: the averaged ones where it keeps any)
  --shard_bytes=N         most bytes of one file of tensors (default: 5,000,000,000)

Files of a published folder that has checksums are compared with them first. What was read, and
what was not, goes to manifest.json beside the result.
"""

FROM = flags.DEFINE_string('from', None, 'what is converted')
TO = flags.DEFINE_enum('to', None, ['huggingface', 'checkpoint'], 'what it becomes')
OUT = flags.DEFINE_string('out', None, 'where it goes')
DTYPE = flags.DEFINE_enum('dtype', None, ['float32', 'bfloat16'], 'of the matrices')
STEP = flags.DEFINE_integer('step', None, 'checkpoint; the newest by default')
WEIGHTS = flags.DEFINE_enum('weights', None, ['averaged', 'raw'], 'averaged where there are any')
SHARD = flags.DEFINE_integer('shard_bytes', 5_000_000_000, 'most bytes of one file', lower_bound=1)


def main() -> None:
  """Runs the script."""
  from deepseek_jax.convert.export import check_sums
  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.data.progress import Progress, say
  from deepseek_jax.hub import from_pretrained

  missing = [f'--{flag.name} is missing' for flag in (FROM, TO, OUT) if flag.value is None]
  if missing:
    raise ConfigError(missing)
  given, target, weights = str(FROM.value), str(OUT.value), cast('Weights | None', WEIGHTS.value)
  source, out = pathlib.Path(given).expanduser(), pathlib.Path(target).expanduser()
  check_sums(source)
  dtype = DTYPE.value if TO.value == 'checkpoint' else None
  model = from_pretrained(given, STEP.value, weights, dtype=dtype)
  if TO.value == 'checkpoint':
    folder = model.save(out)
  else:
    folder, done = out, 0
    progress = Progress('writing', 'tensors')
    for done, _ in enumerate(model.export(out, DTYPE.value, SHARD.value), start=1):
      progress.update(done)
    progress.finish(done)
  if model.manifest is not None:
    text = json.dumps(model.manifest._asdict(), indent=2)
    (out / 'manifest.json').write_text(text + '\n', encoding='utf-8')
    if model.manifest.without_mtp:
      say(f'{source}: has no weights of multi-token prediction, though its config speaks of it')
  say(f'{folder}: {model.experiment.name} at step {model.step}')


if __name__ == '__main__':
  launch.run(main, USAGE)
