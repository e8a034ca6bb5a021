"""Says what placing experts by their load would do for a run, from its log."""

import pathlib

from absl import flags

from deepseek_jax.core.config import ConfigError
from scripts import launch

USAGE = """
Plans where experts lie, with replicas of heavy ones, from the loads that a run logged.

  python scripts/plan_placement.py RUN … --devices=8 --slots=24

  RUN           the folder of a run
  --devices=N   devices that share the experts
  --slots=N     places for experts on all devices together; as many as experts is no replica
  --groups=N    groups of experts, each to lie on one node (default: 1)
  --nodes=N     nodes that the devices are on (default: 1, where groups do not matter)
  --window=N    logged steps that one plan is made from (default: 10)
  --start=STEP  leaves out what was logged before (default: 0)

Prints, for each layer, the largest load of a device over the mean, averaged over windows: with the
experts in order; packed by their loads, each once; with replicas; and with replicas planned from
the window before, which is what a run would get. 1 is even.
"""

DEVICES = flags.DEFINE_integer('devices', None, 'devices that share the experts', lower_bound=1)
SLOTS = flags.DEFINE_integer('slots', None, 'places for experts', lower_bound=1)
GROUPS = flags.DEFINE_integer('groups', 1, 'groups of experts', lower_bound=1)
NODES = flags.DEFINE_integer('nodes', 1, 'nodes that the devices are on', lower_bound=1)
WINDOW = flags.DEFINE_integer('window', 10, 'logged steps of one plan', lower_bound=1)
START = flags.DEFINE_integer('start', 0, 'leaves out what was logged before')


def main(arguments: list[str]) -> None:
  """Runs the script.

  Args:
    arguments: folders of runs.

  Raises:
    ConfigError: a flag or the run is missing, or the log has too few loads.
  """
  if not arguments:
    raise ConfigError('expected the folder of a run; for example runs/first')
  devices, slots = DEVICES.value, SLOTS.value
  if devices is None or slots is None:
    raise ConfigError('--devices or --slots is missing; for example --devices=8 --slots=24')

  from deepseek_jax.lab.placement import placement_table, plan_placement
  from deepseek_jax.train.history import read_history

  for argument in arguments:
    history = read_history(pathlib.Path(argument))
    rows = [row for row in history.rows if row['step'] >= START.value]
    try:
      layers = plan_placement(
        rows,
        devices=devices,
        slots=slots,
        groups=GROUPS.value,
        nodes=NODES.value,
        window=WINDOW.value,
      )
    except ConfigError as error:
      raise ConfigError(f'{argument}: {message}' for message in error.messages) from error
    print(f'{argument}\n{placement_table(layers)}')


if __name__ == '__main__':
  launch.run_with_arguments(main, USAGE)
