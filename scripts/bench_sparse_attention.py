"""Takes sparse attention apart: what its time is made of, and what sharing keys costs.

  python scripts/bench_sparse_attention.py --what=parts    # scores, selection, gathering, products
  python scripts/bench_sparse_attention.py --what=sharing  # blocks that share keys: recall and time

Sizes are those of a small MLA: 32 heads, 64 + 32 channels, latent 256; an indexer of 4 × 32; 512
keys a query. Whole layers are timed by scripts/bench_attention.py. Run it on a machine that does
nothing else.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags

from scripts import attention_cases
from scripts.attention_cases import FORWARD, compile_case

WHAT = flags.DEFINE_enum('what', 'parts', ['parts', 'sharing'], 'what to time')
ROUNDS = flags.DEFINE_integer('rounds', 1, 'rounds that count, after one to warm up', lower_bound=1)
LENGTH = flags.DEFINE_integer('length', 32768, 'tokens T', lower_bound=64)
TOP_K = flags.DEFINE_integer('top_k', 512, 'keys k a query', lower_bound=1)
HEADS, LATENT, ROPE = 32, 256, 32


def seconds(call: Callable[[], Any]) -> float:
  """Runs a call once."""
  import jax

  begin = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - begin


def draws() -> Any:
  """Returns index queries, keys, weights, latent queries and rows, as one row of tokens."""
  import jax

  length, width = LENGTH.value, LATENT + ROPE
  keys = jax.random.split(jax.random.key(0), 5)
  shapes = [(length, 4, 32), (length, 32), (length, 4), (min(length, 2048), HEADS, width)]
  shapes.append((length, width))
  return [jax.random.normal(key, (1, *shape)) for key, shape in zip(keys, shapes, strict=True)]


def gather(rows: Any, indices: Any) -> Any:
  """Gathers the chosen rows of 8 queries at a time, and does nothing else with them."""
  import jax
  import jax.numpy as jnp

  def one(found):
    return jnp.sum(jnp.take(rows[0], found, axis=0, mode='clip'), axis=(0, 1))

  return jax.lax.map(one, indices[0].reshape(-1, 8, indices.shape[-1]))


def scores(query: Any, key: Any, weights: Any) -> Any:
  """Scores all pairs, 64 queries at a time, and keeps each query's highest."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.ops.attention.select import index_scores

  def one(start):
    piece = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=64, axis=1)
    found = index_scores(piece(query, start), key, piece(weights, start))
    return jnp.max(found, axis=-1)

  return jax.lax.map(one, jnp.arange(0, query.shape[1], 64))


def parts() -> None:
  """What the time of exact DSA is made of; attention of 2,048 queries is scaled up."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.ops.attention import select
  from deepseek_jax.ops.attention.gathered import KeySets, attend_blocks, attend_selected
  from deepseek_jax.ops.attention.reference import Seen

  query, key, weights, latent, rows = draws()
  length = LENGTH.value
  places = jnp.arange(length, dtype=jnp.int32)[None]
  seen = Seen(places, places)
  top_k, scale = min(TOP_K.value, length), length / latent.shape[1]
  some = jax.random.randint(jax.random.key(1), (1, latent.shape[1], top_k), 0, length, jnp.int32)
  shared = KeySets(
    jnp.sort(some[:, ::64], axis=-1), 64, Seen(places[:, -latent.shape[1] :], places)
  )

  def attend(query, rows):
    return attend_selected(query, rows, LATENT, some, scale=0.1).out

  def attend_shared(query, rows):
    return attend_blocks(query, rows, LATENT, shared, scale=0.1).out

  def both_ways(function):
    return jax.grad(lambda *given: jnp.sum(jnp.sin(function(*given))), argnums=(0, 1))

  cases: dict[str, tuple[Callable[..., Any], tuple[Any, ...], float]] = {
    'index scores of all pairs': (scores, (query, key, weights), 1.0),
    'the same and the best of them': (
      functools.partial(select.select_top_k, seen=seen, top_k=top_k, ordered=True),
      (query, key, weights),
      1.0,
    ),
    'gathering alone': (gather, (rows, some), scale),
    'attention, each its keys': (attend, (latent, rows), scale),
    '… and its gradients': (both_ways(attend), (latent, rows), scale),
    'attention, 64 share keys': (attend_shared, (latent, rows), scale),
    '… and their gradients': (both_ways(attend_shared), (latent, rows), scale),
  }
  print(f'{length} tokens, {top_k} keys a query')
  for name, (function, arguments, factor) in cases.items():
    run = jax.jit(function).lower(*arguments).compile()
    call = functools.partial(run, *arguments)
    seconds(call)
    taken = statistics.median(seconds(call) for _ in range(ROUNDS.value))
    print(f'  {name:<32} {taken * factor:8.2f} s')


def sharing() -> None:
  """Recall of shared keys, for queries that change slowly or fast, and the time they take.

  Index queries follow one another with a correlation; keys are independent. Recall is the share of
  the keys that a query would select for itself which its block attends to.
  """
  import jax
  import jax.numpy as jnp

  from deepseek_jax.layers.attention.sparse import DSA, Each, Shared
  from deepseek_jax.ops.attention import block_sets
  from deepseek_jax.ops.attention.divergence import membership
  from deepseek_jax.ops.attention.reference import Seen
  from deepseek_jax.ops.attention.select import select_top_k

  noise, key, *_ = draws()
  length = LENGTH.value
  top_k = min(TOP_K.value, length)
  places = jnp.arange(length, dtype=jnp.int32)[None]
  seen = Seen(places, places)
  kinds = attention_cases.kinds(HEADS, TOP_K.value)
  base = kinds['DSA shared']
  rows = jnp.arange(length // 2, length, max(length // 512, 1))
  correlations = (0.0, 0.9, 0.99, 0.999)
  print(f'{length} tokens, {top_k} keys; recall where neighbouring queries correlate by')
  print(f'  {"block":<8}' + ''.join(f'{c:>8}' for c in correlations) + f'{"forward":>12}')
  for block in (1, 16, 32, 64, 128):
    line = []
    for correlation in correlations:

      def follow(last, fresh, correlation=correlation):
        new = correlation * last + math.sqrt(1 - correlation**2) * fresh
        return new, new

      query = jax.lax.scan(follow, noise[0, 0], noise[0])[1][None]
      ones = jnp.ones(query.shape[:3])
      own = select_top_k(query[:, rows], key, ones[:, rows], seen.at(rows), top_k)
      if block == 1:
        line.append(1.0)
        continue
      first = block_sets.leaders(seen, block, 64)
      leading = query[:, ::block]
      found = select_top_k(leading, key, ones[:, ::block], first, top_k)
      starts = jnp.arange(0, length, block)
      sets = block_sets.joined(found, starts, length, block, 64)
      mine, all_own = (membership(i, length) for i in (sets[:, rows // block], own))
      line.append(float(jnp.sum(mine & all_own) / jnp.sum(all_own)))
    shared = Each() if block == 1 else Shared(block=block)
    case = attention_cases.layer(DSA(**{**vars(base), 'sharing': shared}), length, 'float32', False)
    call = compile_case(case, FORWARD).call
    seconds(call)
    taken = statistics.median(seconds(call) for _ in range(ROUNDS.value))
    print(f'  {block:<8}' + ''.join(f'{r:8.3f}' for r in line) + f'{taken:10.2f} s')


def main(argv: list[str]) -> None:
  """Runs one of the questions."""
  del argv
  {'parts': parts, 'sharing': sharing}[WHAT.value]()


if __name__ == '__main__':
  app.run(main)
