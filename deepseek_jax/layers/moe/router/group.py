"""Groups of experts: what may be wrong with their numbers."""


def group_faults(groups: int, kept_groups: int) -> list[str]:
  """Returns what is wrong with keeping `kept_groups` of `groups` groups, as messages."""
  errors = []
  if groups < 1:
    errors.append(f'`groups` is {groups}; expected 1 or more')
  if not 1 <= kept_groups <= max(groups, 1):
    errors.append(f'`kept_groups` is {kept_groups}; expected 1 to `groups` {groups}')
  return errors


def reach_faults(groups: int, kept_groups: int, experts: int, top_k: int) -> list[str]:
  """Returns what is wrong with choosing `top_k` of `experts` experts so, as messages."""
  if experts % groups:
    return [f'`groups` is {groups}, which does not divide {experts} experts']
  reachable = experts // groups * kept_groups
  if top_k > reachable:
    return [f'`kept_groups` {kept_groups} leave {reachable} experts to choose {top_k} from']
  return []
