"""Dense attention on a TPU: the Pallas kernels of splash attention that come with JAX.

Blocks of scores stay in the chip's memory, and blocks beyond the diagonal or a window are skipped.
The kernels know order in the row, not positions: they fit where the two say the same.

Source: Dao, arXiv 2307.08691.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from deepseek_jax.ops.attention.blocks import Back, Extras, Static
from deepseek_jax.ops.attention.reference import Seen
from deepseek_jax.ops.mesh import arrays_are_whole

LANES = 128
"""Rows have to be made of as many: the width of the chip's vectors."""
SIDE = 512
"""Largest side of a block of scores: 1 MB in float32, beside queries, keys, values and sums."""


def fits(
  query: jax.Array, key: jax.Array, value: jax.Array, extras: Extras, static: Static
) -> bool:
  """Whether the kernels take such arrays [B, T, H, K], and these are whole here.

  Positions below a window's second number, and biases of keys, are not known to the kernels.
  """
  dtypes = {query.dtype, key.dtype, value.dtype}
  return (
    arrays_are_whole()
    and static.in_order
    and query.shape[1] == key.shape[1]
    and query.shape[1] % LANES == 0
    and extras.key_bias is None
    and (static.window is None or static.window[1] == 0)
    and len(dtypes) == 1
    and dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}
  )


def forward(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  extras: Extras,
  seen: Seen,
  static: Static,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Returns outputs [B, T, H, V] and log-sums [B, T, H] float32; see `long_rows.forward`.

  `interpret` runs the kernels step by step on any back end: for tests.
  """
  kernel = _kernel(query, static, interpret)
  q, k, v = _heads_first(query * static.scale), _heads_first(key), _heads_first(value)
  documents = _documents(seen)
  mix = lambda q, k, v, documents: kernel(q, k, v, documents, extras.sinks)  # noqa: E731
  out, (log_sum,) = jax.vmap(mix)(q, k, v, documents)
  return _heads_first(out).astype(value.dtype), _heads_first(log_sum)


def backward(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  extras: Extras,
  seen: Seen,
  static: Static,
  back: Back,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
  """Returns the gradients of queries, keys and values [B, T, H, K]; see `long_rows.backward`."""
  kernel = _kernel(query, static, interpret)
  blocks = kernel.kwargs['block_sizes']
  assert kernel.dq_mask_info is not None
  assert kernel.dkv_mask_info is not None
  to_queries, to_keys = kernel.dq_mask_info, kernel.dkv_mask_info
  facts = {
    name: kernel.kwargs[name]
    for name in ('is_mqa', 'mask_value', 'attn_logits_soft_cap', 'mask_function', 'interpret')
  }
  facts |= {name: getattr(blocks, name) for name in ('q_layout', 'k_layout', 'v_layout')}

  def pull(q, k, v, documents, log_sum, grad, drift):
    arrays = (q, k, v, documents, extras.sinks, log_sum, grad, drift)
    _, grad_k, grad_v = splash._splash_attention_bwd_dkv(
      *arrays,
      bq=blocks.block_q_dkv,
      bkv=blocks.block_kv_dkv,
      bkv_compute=blocks.block_kv_dkv_compute,
      mask_info=to_keys,
      use_fused_bwd_kernel=False,
      **facts,
    )
    grad_q = splash._splash_attention_bwd_dq(
      *arrays,
      bq=blocks.block_q_dq,
      bkv=blocks.block_kv_dq,
      mask_info=to_queries,
      **facts,
    )
    return grad_q, grad_k, grad_v

  q, k, v, grad, log_sum, drift = map(
    _heads_first, (query * static.scale, key, value, back.grad.astype(value.dtype), *back[:2])
  )
  grads = jax.vmap(pull)(q, k, v, _documents(seen), log_sum, grad, drift)
  grad_q, grad_k, grad_v = map(_heads_first, grads)
  grad_q = (grad_q * static.scale).astype(query.dtype)
  return grad_q, grad_k.astype(key.dtype), grad_v.astype(value.dtype), None


def _kernel(query: jax.Array, static: Static, interpret: bool) -> splash.SplashAttentionKernel:
  length, heads = query.shape[1:3]
  side = max(size for size in (LANES, 2 * LANES, SIDE) if length % size == 0)
  shape = (length, length)
  mask = (
    masks.CausalMask(shape)
    if static.window is None
    else masks.LocalMask(shape, (static.window[0] - 1, 0), 0)
  )
  blocks = splash.BlockSizes(
    block_q=side,
    block_kv=side,
    block_q_dkv=side,
    block_kv_dkv=side,
    block_q_dq=side,
    block_kv_dq=side,
  )
  return splash.make_splash_mha(
    masks.MultiHeadMask([mask] * heads),
    block_sizes=blocks,
    save_residuals=True,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )


def _documents(seen: Seen) -> splash.SegmentIds | None:
  if seen.query_segments is None or seen.key_segments is None:
    return None
  return splash.SegmentIds(q=seen.query_segments, kv=seen.key_segments)


def _heads_first(x: jax.Array) -> jax.Array:
  """[B, T, H, …] <-> [B, H, T, …]."""
  return jnp.swapaxes(x, 1, 2)
