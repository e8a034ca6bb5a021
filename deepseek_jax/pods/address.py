"""From what an operation was traced from to the module that made it, and the pass it is in."""

import re

_WRAPPER = re.compile(r'^(?:jvp|vmap|transpose|checkpoint|remat)\((.*)\)$')
_WORD = re.compile(r'^[A-Za-z_][\w.]*$')
_BRANCH = re.compile(r'^(?:branch_\d+_fun|block_\d+)$')
_NOISE = frozenset({
  'while', 'body', 'cond', 'closed_call', 'eval_jaxpr', 'shard_map', 'rematted_computation',
  'checkpoint', 'scan', 'run', 'core_call', 'custom_vjp_call', 'custom_jvp_call', 'pjit',
  'attend', 'stack', 'Decoder',
})  # fmt: skip
"""Scopes that say how something is run and not what made it."""

PHASES = ('forward', 'recompute', 'backward', 'update')


def phase_of(op_name: str) -> str:
  """Returns which of `PHASES` of a training step an operation belongs to."""
  if '/optimizer/' in op_name:
    return 'update'
  if 'rematted_computation' in op_name:
    return 'recompute'
  return 'backward' if 'transpose(' in op_name else 'forward'


def module_of(op_name: str, depth: int = 3) -> str:
  """Returns the address of the module that an operation is part of.

  Such as 'segment_1/feed_forward/experts'; 'scans' for what moves layers' weights and streams in
  and out of a scan, 'step' for what no module made.

  Args:
    op_name: the scopes that it was traced in, its primitive last.
    depth: parts of the address to keep.
  """
  parts: list[str] = []
  scopes = op_name.split('/')[:-1]
  for part in scopes:
    inner = part
    while (match := _WRAPPER.match(inner)) is not None:
      inner = match[1]
    if inner.startswith('Decoder.') or not _WORD.match(inner):
      continue
    if inner in _NOISE or _BRANCH.match(inner):
      continue
    # A method is called by the name of its module, a dot and its own.
    inner = inner.split('.')[-1]
    if not parts or parts[-1] != inner:
      parts.append(inner)
  if not parts and 'stack' in scopes:
    return 'scans'
  return '/'.join(parts[:depth]) or 'step'
