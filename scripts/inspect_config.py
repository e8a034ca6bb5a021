"""Shows what a config is: every value, the plan, the parameters, the cost."""

from absl import flags

from scripts import launch

USAGE = """
Shows what a config is, without a device and without data.

  python scripts/inspect_config.py --config=configs/v3_671b.py [--config.path=value] …

  --config=FILE           a config file, or the name of one in configs/; arguments of its function
                          may follow: 'ladder(depth=4)'
  --config.path=value     changes one part
  --against=FILE          prints only what differs from another config
"""

AGAINST = flags.DEFINE_string('against', None, 'another config file')


def main(config_path: str | None, assignments: dict[str, str]) -> None:
  """Runs the script."""
  import jax

  from deepseek_jax.core.config import ConfigError
  from deepseek_jax.core.override import override_from_text
  from deepseek_jax.core.serialise import difference, to_python
  from deepseek_jax.models.cost import weights_of
  from deepseek_jax.models.decoder import init_variables
  from deepseek_jax.sharding.rules import logical_axes
  from deepseek_jax.train import summary

  if config_path is None:
    raise ConfigError('--config is missing; for example --config=configs/quickstart.py')
  experiment, changes = override_from_text(launch.load_experiment(config_path), assignments)
  for change in changes:
    print(f'changed  {change}')
  if AGAINST.value is not None:
    for change in difference(launch.load_experiment(AGAINST.value), experiment):
      print(change)
    return
  decoder = experiment.model.build(remat=experiment.remat, stages=experiment.stages)
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  axes, segments = logical_axes(boxed)['params'], experiment.segments
  weights = weights_of(experiment.model, boxed_shapes(boxed), axes, segments)
  print(to_python(experiment), end='\n\n')
  print(summary.describe_layers(experiment.model, segments), end='\n\n')
  if experiment.stages is not None:
    print(summary.describe_stages(experiment), end='\n\n')
  print(summary.describe_parameters(weights), end='\n\n')
  print(summary.describe_cost(experiment, weights))


def boxed_shapes(boxed: dict) -> dict:
  """Returns the parameters' shapes without their labels."""
  from flax import linen as nn

  return nn.meta.unbox(boxed)['params']


if __name__ == '__main__':
  launch.run_with_config(main, USAGE)
