"""Attention to chosen keys on a TPU: Pallas kernels that fetch each chosen row where it is needed.

A step of the grid serves a few sets of keys, each of one query or of a block of queries, who see of
it what positions and segments say. It reads the keys' numbers from scalar memory and makes tiles of
128 rows in the chip's fast memory (VMEM): of all rows, if they fit in there too, else by copies
from main memory (HBM) that run one tile ahead of the products. A row is whole in memory, so that
its copy is one piece. What is gathered, and the scores, never go to main memory. Nor does what sets
say of the keys' gradient: it is summed in VMEM, which has to hold it.

Bytes of main memory, for N sets of m keys among S rows that are w bytes each as they are laid out,
a channel a word of 4 bytes in the gradient, whose rows are g bytes; all but queries and outputs:

  forward   rows in VMEM  S w        else  N m w
  backward  rows in VMEM  S (w + g)  else  N m w + S g

The compiler's loop writes and reads the gathered rows in order, reads all rows anew in each of its
steps where they fit into VMEM, and adds N m rows of float32 to others in main memory. For one row
of 4,096 tokens, 16 heads, 512 + 64 channels in bfloat16 (w is 1,536, g 2,560) and 512 keys a query,
programs that are compiled for v5p move, with queries and outputs, which are laid out on the way:

                      rows in VMEM   in HBM    loop
  forward                   0.5 GB   3.7 GB   10.8 GB
  backward                  1.0 GB   4.2 GB   47 GB
  64 queries share 640      0.5 GB   0.5 GB    1.7 GB
  their backward            0.8 GB   0.8 GB    3.2 GB

A layer of CSA with V4's sizes (64 heads of 512 channels, 128 tokens and 512 entries a query), in
all its parts, value and gradient of 4,096 tokens: 30 GB; a loop over blocks of queries moves 94.

These are sums over the operations of compiled programs, not measurements on a chip. Bytes are not
all: the schedule of a tile has 545 cycles if rows are in VMEM, 2.4 of them a row to make the tile,
and 795 if they are not, 4.4 a row to start its copy.

Source: the products of a set of keys that queries share: Yuan et al. (NSA), arXiv 2502.11089,
section 3.4; the running softmax: Milakov and Gimelshein, arXiv 1805.02867, algorithm 3.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deepseek_jax.ops.attention.blocks import Back, Extras
from deepseek_jax.ops.attention.gathered_loop import Form
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.kernels import gathered_layout as layout
from deepseek_jax.ops.kernels.gathered_plan import (
  LANES,
  TILE,
  Call,
  cut_up,
  lay_out,
  memory,
  round_up,
)
from deepseek_jax.ops.kernels.gathered_steps import backward_kernel, forward_kernel
from deepseek_jax.ops.mesh import arrays_are_whole

LARGEST = 1 << 15
"""Keys of a set: their numbers take 256 kB of scalar memory, twice over."""
WASTE = 2.0
"""How many times as large as its channels the row that is fetched may be."""


def fits(
  form: Form,
  query: jax.Array,
  rows: jax.Array,
  indices: jax.Array,
  backward: bool = False,
) -> bool:
  """Whether a kernel takes such arrays [B, T, H, K], [B, G, S, W] and [B, N, m], whole here.

  Fewer chosen keys than there are rows are not worth laying all rows out anew, nor are rows of a
  few channels. The gradient of the keys has to fit into VMEM.
  """
  dtypes = {query.dtype, rows.dtype}
  if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
    return False
  row, share = lay_out(form, rows.dtype), query.shape[2] // rows.shape[1]
  return (
    arrays_are_whole()
    and indices.shape[1] * indices.shape[2] >= rows.shape[2]
    and 0 < indices.shape[2] <= LARGEST
    and (form.block == 1 or (form.block % 8 == 0 and (share == 1 or share % 8 == 0)))
    and row.width * 4 <= WASTE * rows.shape[3] * rows.dtype.itemsize
    and cut_up(form, query, rows, indices, backward) is not None
  )


def forward(
  form: Form,
  query: jax.Array,
  rows: jax.Array,
  extras: Extras,
  indices: jax.Array,
  seen: Seen | None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns outputs [B, T, H, V], log-sums [B, T, H] and the keys' weights [B, T, m] or None.

  See `gathered_loop.forward`. `interpret` runs the kernel step by step on any back end: for tests.
  """
  call = _call(form, query, rows, extras.key_bias, indices, seen, False)
  cut, row, batch = call.cut, call.row, query.shape[0]
  arrays = {
    **layout.numbers(call, indices),
    **layout.facts_of(call, extras.key_bias, indices, seen),
    'query': layout.lay_queries(call, query),
    'rows': layout.lay_rows(call, rows),
  }
  if extras.sinks is not None:
    sinks = extras.sinks.astype(jnp.float32).reshape(rows.shape[1], cut.share, 1)
    arrays['sinks'] = jnp.tile(sinks, (1, cut.queries, 1))
  head = (batch, cut.steps * cut.sets, rows.shape[1], cut.rows)
  outputs = {
    'out': jax.ShapeDtypeStruct((*head, row.parts * row.out), rows.dtype),
    'log_sum': jax.ShapeDtypeStruct((*head, 1), jnp.float32),
  }
  scratch = {
    **_buffers(call, rows.dtype),
    'top': pltpu.VMEM((cut.groups, cut.rows, 1), jnp.float32),
    'total': pltpu.VMEM((cut.groups, cut.rows, 1), jnp.float32),
    'sum': pltpu.VMEM((cut.groups, cut.rows, row.parts * row.out), jnp.float32),
  }
  if form.mass:
    shape = (batch, cut.chunks, head[1], cut.queries, cut.tiles * TILE)
    outputs['mass'] = jax.ShapeDtypeStruct(shape, jnp.float32)
    scratch['kept'] = pltpu.VMEM((cut.tiles, cut.groups, cut.rows, TILE), jnp.float32)
  out = _run(forward_kernel, call, arrays, outputs, scratch, 2, interpret)
  log_sum = layout.to_tokens(call, out['log_sum'])[..., 0]
  values = layout.to_tokens(call, layout.taken(out['out'], row.values)[..., : form.value[1]])
  length = query.shape[1]
  mass = None
  if form.mass:
    mass = jnp.sum(out['mass'], axis=1)[..., : indices.shape[2]]
    mass = mass.reshape(batch, -1, indices.shape[2])[:, :length]
  return values[:, :length], log_sum[:, :length], mass


def backward(
  form: Form,
  query: jax.Array,
  rows: jax.Array,
  key_bias: jax.Array | None,
  indices: jax.Array,
  seen: Seen | None,
  back: Back,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """Returns gradients of queries [B, T, H, K], rows [B, G, S, W] and bias [B, S] or None.

  See `gathered_loop.backward`.
  """
  call = _call(form, query, rows, key_bias, indices, seen, True)
  cut, row, (batch, groups, slots, _) = call.cut, call.row, rows.shape
  sums = jnp.stack([back.log_sum, back.drift], axis=-1)
  queries = layout.lay_queries(call, query)
  arrays = {
    **layout.numbers(call, indices),
    **layout.facts_of(call, key_bias, indices, seen),
    'query': queries,
    'grad': layout.lay_values(call, back.grad.astype(rows.dtype)),
    'sums': layout.to_heads(call, sums),
    'rows': layout.lay_rows(call, rows),
  }
  wide = _gradient_lanes(call)
  outputs = {
    'to_query': jax.ShapeDtypeStruct(queries.shape, query.dtype),
    'to_rows': jax.ShapeDtypeStruct((batch, cut.chunks, round_up(slots, 8), 1, wide), jnp.float32),
  }
  scratch = {
    **_buffers(call, rows.dtype),
    'sum': pltpu.VMEM((cut.groups, cut.rows, row.key), jnp.float32),
    'part': pltpu.VMEM((TILE, 1, wide), jnp.float32),
    'whole': pltpu.VMEM((round_up(slots, 8), 1, wide), jnp.float32),
    'done': pltpu.SemaphoreType.DMA,
  }
  out = _run(backward_kernel, call, arrays, outputs, scratch, 5, interpret)
  to_query = out['to_query']
  to_rows = out['to_rows'][:, :, :slots, 0]
  to_bias = None
  if key_bias is not None:
    to_bias = jnp.sum(to_rows[..., -LANES], axis=1)
    to_rows = to_rows[..., :-LANES]
  # [B, chunks, S, groups of a chunk · lanes] -> [B, G, S, lanes]
  to_rows = to_rows.reshape(batch, cut.chunks, slots, cut.groups, -1)
  to_rows = jnp.moveaxis(to_rows, 3, 2).reshape(batch, groups, slots, -1)
  if row.shared:
    to_query, to_rows = layout.taken_keys(call, to_query), layout.taken_keys(call, to_rows)
  else:
    to_query = layout.taken(to_query, row.others, row.others[0].lanes.start)
    value = layout.taken(to_rows, row.values)[..., : form.value[1]]
    to_rows = jnp.concatenate([layout.taken(to_rows, row.others), value], axis=-1)
  to_query = layout.to_tokens(call, to_query)[:, : query.shape[1]]
  return to_query, to_rows.astype(rows.dtype), to_bias


def _call(form, query, rows, key_bias, indices, seen, backward: bool) -> Call:
  cut = cut_up(form, query, rows, indices, backward)
  assert cut is not None
  segments = seen is not None and seen.query_segments is not None
  row = lay_out(form, rows.dtype)
  return Call(form, row, cut, rows.shape[2], segments, key_bias is not None)


def _run(kernel, call: Call, arrays, outputs, scratch, flops: int, interpret: bool):
  """Calls a kernel, which does so many FLOPs a pair and channel."""
  cut, row = call.cut, call.row
  names = (*arrays, *outputs, *scratch)
  batch, whole = arrays['query'].shape[0], pltpu.MemorySpace.HBM
  own = ('query', 'grad', 'sums', 'out', 'log_sum', 'to_query')

  def spec(name, x):
    rest = x.shape[2:]
    if name in own:
      block = (None, cut.sets, cut.groups, *x.shape[3:])
      return pl.BlockSpec(block, lambda b, c, i: (b, i, c, 0, 0))
    if name in ('places', 'counts'):
      block = (None, None, *rest)
      return pl.BlockSpec(block, lambda b, c, i: (b, i, 0, 0), memory_space=pltpu.SMEM)
    if name in ('key_facts', 'query_facts'):
      return pl.BlockSpec((None, cut.sets, *rest), lambda b, c, i: (b, i, 0, 0))
    if name == 'mass':
      block = (None, None, cut.sets, *x.shape[3:])
      return pl.BlockSpec(block, lambda b, c, i: (b, c, i, 0, 0))
    if name == 'rows' and cut.resident:
      block, once = (None, *x.shape[1:3], x.shape[3] // cut.chunks), pl.Buffered(1)
      return pl.BlockSpec(block, lambda b, c, i: (b, 0, 0, c), pipeline_mode=once)
    if name == 'sinks':
      return pl.BlockSpec((cut.groups, *x.shape[1:]), lambda b, c, i: (c, 0, 0))
    return pl.BlockSpec(memory_space=whole)

  pairs = batch * cut.steps * cut.sets * cut.groups * cut.chunks * cut.rows * cut.tiles * TILE
  moved = sum(x.size * x.dtype.itemsize for x in (*arrays.values(), *outputs.values()))
  if not cut.resident:
    fetched = batch * cut.steps * cut.sets * cut.tiles * TILE
    moved += (fetched - batch * call.slots) * cut.groups * cut.chunks * row.width * 4
  # The gradient of the keys is a sum over all steps.
  last = pltpu.ARBITRARY if 'to_rows' in outputs else pltpu.PARALLEL
  found = pl.pallas_call(
    functools.partial(kernel, names, call),
    grid=(batch, cut.chunks, cut.steps),
    in_specs=[spec(*item) for item in arrays.items()],
    out_specs=[spec(*item) for item in outputs.items()],
    out_shape=list(outputs.values()),
    scratch_shapes=list(scratch.values()),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=(pltpu.PARALLEL, pltpu.PARALLEL, last),
      vmem_limit_bytes=int(0.9 * memory()),
      # No place is beyond the rows: they are clipped before.
      disable_bounds_checks=True,
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops * pairs * (row.key + row.parts * row.out),
      transcendentals=pairs,
      bytes_accessed=moved,
    ),
    interpret=interpret,
    name='gathered_' + kernel.__name__.removesuffix('_kernel'),
  )(*arrays.values())
  return dict(zip(outputs, found, strict=True))


def _buffers(call: Call, dtype: Any) -> dict[str, Any]:
  cut = call.cut
  words = jnp.int32 if call.row.parts > 1 else dtype
  return {
    'buffer': pltpu.VMEM((2, TILE, 1, cut.groups * call.row.width), words),
    'arrived': pltpu.SemaphoreType.DMA((2,)),
  }


def _gradient_lanes(call: Call) -> int:
  """Lanes of a row of the keys' gradient of a chunk of groups; the bias has the last vector."""
  row = call.row
  return call.cut.groups * row.lanes + (LANES if call.biased else 0)
