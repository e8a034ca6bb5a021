"""Times one token of attention over a long cache: V4's compressed kinds beside MLA, in one run.

  python scripts/bench_decode_attention.py                 # 64 K tokens of context
  python scripts/bench_decode_attention.py --context=16384 --dtype=float32

A layer of each kind is given a cache of random numbers and the next token, kinds by turns, round by
round; medians count. Bytes are of the whole cache, exactly. A model of V4 alternates CSA and HCA:
their mean is what a layer costs, and stands last. Run it on a machine that does nothing else.
"""

import functools
import statistics
import time
from typing import Any

from absl import app, flags

CONTEXT = flags.DEFINE_integer('context', 65_536, 'tokens that the cache holds', lower_bound=1)
WIDTH = flags.DEFINE_integer('width', 512, 'channels D', lower_bound=1)
HEADS = flags.DEFINE_integer('heads', 32, 'query heads H', lower_bound=1)
LATENT = flags.DEFINE_integer('latent', 256, 'latent of MLA, key of the others', lower_bound=1)
TOP_K = flags.DEFINE_integer('top_k', 512, 'entries that CSA attends to', lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 15, 'rounds that count', lower_bound=1)
DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', ['float32', 'bfloat16'], 'of cache and activations')


def kinds() -> dict[str, Any]:
  """Returns the attention kinds by name, sizes alike."""
  from deepseek_jax.layers.attention.csa import CSA
  from deepseek_jax.layers.attention.hca import HCA
  from deepseek_jax.layers.attention.latent import MLA

  heads, latent = HEADS.value, LATENT.value
  shared: dict[str, Any] = {
    'heads': heads,
    'head_dim': latent,
    'rope_dim': 32,
    'query_latent': latent,
    'groups': min(heads, 4),
    'group_dim': latent,
  }
  mla = MLA(heads=heads, nope_dim=64, rope_dim=32, value_dim=64, latent=latent, query_latent=latent)
  csa = CSA(**shared, top_k=TOP_K.value, index_heads=4, index_dim=latent // 4)
  return {'MLA': mla, 'CSA': csa, 'HCA': HCA(**shared)}


def ready(kind: Any) -> tuple[Any, int]:
  """Returns a call that decodes the last token, and the bytes of the cache."""
  import jax
  import jax.numpy as jnp
  from flax import linen as nn

  from deepseek_jax.core.tree import bytes_of
  from deepseek_jax.layers.context import Context

  dtype, length = jnp.dtype(DTYPE.value), CONTEXT.value
  position = jnp.full((1, 1), length - 1, jnp.int32)
  ones = jnp.ones_like(position)
  context = Context(tokens=ones, positions=position, segments=ones)
  x = jax.random.normal(jax.random.key(1), (1, 1, WIDTH.value), dtype)
  module = kind.build()
  params = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), x, context))

  def fill(leaf: Any) -> Any:
    if leaf.dtype == jnp.int32:
      # The last positions, as many as there are slots: a ring of them is as full as it gets.
      return jnp.arange(length - 1 - leaf.shape[1], length - 1, dtype=jnp.int32)[None] % length
    return jax.random.normal(jax.random.key(2), leaf.shape, leaf.dtype)

  cache = jax.tree.map(fill, kind.empty_cache(1, length, dtype))
  step = jax.jit(lambda params, x, cache: module.apply(params, x, context, cache), donate_argnums=2)
  size = bytes_of(cache)
  state = {'cache': cache}

  def call() -> None:
    y, state['cache'] = step(params, x, state['cache'])
    jax.block_until_ready((y, state['cache']))

  return call, size


def main(argv: list[str]) -> None:
  """Measures."""
  del argv
  made = {name: ready(kind) for name, kind in kinds().items()}
  spent: dict[str, list[float]] = {name: [] for name in made}
  for _ in range(ROUNDS.value + 2):
    for name, (call, _) in made.items():
      begin = time.perf_counter()
      call()
      spent[name].append(time.perf_counter() - begin)
  # The first two compile and warm up.
  seconds = {name: statistics.median(times[2:]) for name, times in spent.items()}
  sizes = {name: float(size) for name, (_, size) in made.items()}
  for values in (seconds, sizes):
    values['CSA + HCA, a layer'] = (values['CSA'] + values['HCA']) / 2
  print(f'{CONTEXT.value:,} tokens, {DTYPE.value}')
  ratio = functools.partial('{:.1%}'.format)
  for name in seconds:
    time_text = f'{1e3 * seconds[name]:9.2f} ms {ratio(seconds[name] / seconds["MLA"]):>7}'
    size_text = f'{sizes[name] / 1e6:9.2f} MB {ratio(sizes[name] / sizes["MLA"]):>7}'
    print(f'{name:<20} {time_text}   cache {size_text}')


if __name__ == '__main__':
  app.run(main)
