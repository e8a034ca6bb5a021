"""Measures how evenly a trained model's experts are used on text that it has not read."""

import pathlib

from absl import flags

from scripts import launch

USAGE = """
Measures how evenly the experts of trained models are used.

  python scripts/inspect_routing.py RUN … [--tokens=1000000]

  RUN              the folder of a run on text
  --tokens=N       tokens to read (default: 100,000); the run has read none of them
  --step=N         a checkpoint other than the newest
  --cache_dir=DIR  tokens and pack plans (default: ~/.cache/deepseek_jax)

Prints, for each layer: the mean load of an expert over the largest, over all text together; the
share of experts with at least a tenth of the mean load; the largest load over the mean in one
batch, beside what sampling alone would make of it; and the share of choices that the scores alone,
without bias, groups, breaker or growth, would have made too.
"""

TOKENS = flags.DEFINE_integer('tokens', 100_000, 'tokens to read', lower_bound=1)
STEP = flags.DEFINE_integer('step', None, 'checkpoint; the newest by default')
CACHE_DIR = flags.DEFINE_string('cache_dir', None, 'folder for tokens and pack plans')


def main(arguments: list[str]) -> None:
  """Runs the script.

  Args:
    arguments: folders of runs.

  Raises:
    ConfigError: there is no run, it has no experts, or there is not as much text.
  """
  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.data.pipeline import TextData
  from deepseek_jax.hub import from_pretrained
  from deepseek_jax.lab.routing import routing, routing_table, unread_batches

  if not arguments:
    raise ConfigError('expected the folder of a run; for example runs/first')
  for argument in arguments:
    model = from_pretrained(pathlib.Path(argument), STEP.value)
    data = model.experiment.data.prepare(launch.cache_dir(CACHE_DIR.value))
    if not isinstance(data, TextData):
      raise ConfigError(f'{argument}: a run on captioned pictures; expected one on text')
    layers = routing(model, unread_batches(model, data, TOKENS.value))
    read = int(layers[0].loads.sum())
    print(f'{argument}, step {model.step}: {read:,} choices a layer\n{routing_table(layers)}')


if __name__ == '__main__':
  launch.run_with_arguments(main, USAGE)
