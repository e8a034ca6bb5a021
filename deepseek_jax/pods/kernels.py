"""What the Pallas kernels of this package cost, from their calls in HLO.

A call carries no FLOPs for the compiler to count. Most say what they cost themselves; splash
attention, which does not, is counted from the shapes and the blocks of its mask.
"""

import dataclasses

from deepseek_jax.pods.hlo import Computation, Instruction
from deepseek_jax.pods.work import Work

_PRODUCTS = {'fwd': (1, 1), 'dkv': (2, 2), 'dq': (2, 1)}
"""Products of splash attention for each pair of a query and a key: of the width of keys, of that of
values. Forward: scores, sum. For keys and values: scores, dk; dp, dv. For queries: scores, dq; dp.

Source: Dao, FlashAttention-2, arXiv 2307.08691, algorithm 2.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelModel:
  """Costs of kernels.

  Attributes:
    rows_filled: share of the rows of grouped products that are somebody's; the others are skipped.
  """

  rows_filled: float = 1.0

  def __call__(self, home: Computation, call: Instruction) -> Work | None:
    """Returns the cost of a kernel's call, None if it does not say and is not known."""
    name = call.name.split('.')[0]
    if 'splash' in name or 'splash' in call.op_name:
      return _splash(home, call)
    estimate = call.backend().get('custom_call_config', {}).get('cost_estimate')
    if not estimate:
      return None
    flops = float(estimate.get('flops', 0))
    moved = float(estimate.get('bytes_accessed', 0))
    if name.startswith(('gmm', 'tgmm')):
      flops, moved = flops * self.rows_filled, moved * self.rows_filled
    dtype = _widest(home, call)
    other = float(estimate.get('transcendentals', 0))
    return Work({dtype: flops}, other, moved, flops)


def _widest(home: Computation, call: Instruction) -> str:
  """The dtype of the largest operand."""
  reads = [array for array in home.reads(call) if array.dtype in ('bf16', 'f32', 'f16')]
  return max(reads, key=lambda array: array.bytes).dtype if reads else 'bf16'


def _splash(home: Computation, call: Instruction) -> Work | None:
  """Splash attention: queries and keys [..., H, T, K], values [..., H, T, V], a causal mask."""
  label = call.name + call.op_name
  kind = next((kind for kind in ('dkv', 'dq', 'fwd') if f'_{kind}' in label), None)
  reads = home.reads(call)
  wide = [a for a in reads if len(a.shape) >= 3 and a.dtype in ('bf16', 'f32')]
  if kind is None or len(wide) < 3:
    return None
  query, _, value = wide[:3]
  *_, length, width = query.shape
  heads = query.size // (length * width)
  blocks = [a for a in reads if a.dtype in ('s8', 's32') and len(a.shape) >= 3]
  rows, across = blocks[0].shape[-2:] if blocks else (1, 1)
  side = length / max(rows, 1)
  pairs = side * side * sum(min(across, row + 1) for row in range(rows))
  keys, values = _PRODUCTS[kind]
  flops = 2.0 * heads * pairs * (keys * width + values * value.shape[-1])
  moved = sum(a.bytes for a in (*reads, *call.arrays) if a.space == 0)
  return Work({query.dtype: flops}, heads * pairs, float(moved), flops)
