"""Times mixture-of-experts layers against what they could cost at best, in one run.

  python scripts/bench_moe.py --what=layer        # the layer beside a dense one of equal FLOPs
  python scripts/bench_moe.py --what=ragged       # grouped products beside jax.lax.ragged_dot
  python scripts/bench_moe.py --what=granularity  # 8 to 256 experts at equal FLOPs a token
  python scripts/bench_moe.py --what=decode       # one token
  python scripts/bench_moe.py --what=routers      # routers that learn, and even choices

All candidates of a question take turns, round by round, so that they meet the same machine; medians
count, and the spread is that of the ratios of the rounds. Run it on a machine that does nothing
else. The dense layer is the fastest of several: both dtypes, gate and up apart or as one matrix,
and matrices stored as they are read or transposed.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

from absl import app, flags

WHAT = flags.DEFINE_enum(
  'what', 'layer', ['layer', 'ragged', 'granularity', 'decode', 'routers'], 'what to time'
)
ROUNDS = flags.DEFINE_integer('rounds', 9, 'rounds that count; medians of them', lower_bound=1)
TOKENS = flags.DEFINE_integer('tokens', 8192, 'tokens N', lower_bound=1)
WIDTH = flags.DEFINE_integer('width', 512, 'channels D', lower_bound=1)
HIDDEN = flags.DEFINE_integer('hidden', 256, 'hidden units F of one expert', lower_bound=1)
EXPERTS = flags.DEFINE_integer('experts', 32, 'experts E', lower_bound=1)
TOP_K = flags.DEFINE_integer('top_k', 4, 'experts K a token goes to', lower_bound=1)
DTYPES = flags.DEFINE_list('dtypes', ['float32', 'bfloat16'], 'dtypes of the experts')


def turns(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
  """Runs the calls in turn and returns the seconds of each, round by round; two rounds warm up."""
  import jax

  taken: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(ROUNDS.value + 2):
    for name, call in calls.items():
      begin = time.perf_counter()
      jax.block_until_ready(call())
      taken[name].append(time.perf_counter() - begin)
  return {name: seconds[2:] for name, seconds in taken.items()}


def against(taken: dict[str, list[float]], base: str, names: list[str], faster: bool) -> None:
  """Prints the ratio of each to the base: of speeds where `faster`, else of times."""
  print(f'  {base:<44} {"1.00":>6}           {1e3 * statistics.median(taken[base]):9.2f} ms')
  for name in names:
    pairs = zip(taken[name], taken[base], strict=True)
    ratios = sorted(other / mine if faster else mine / other for mine, other in pairs)
    quarter = len(ratios) // 4
    spread = f'{ratios[quarter]:.2f}–{ratios[-1 - quarter]:.2f}'
    milliseconds = 1e3 * statistics.median(taken[name])
    print(f'  {name:<44} {statistics.median(ratios):6.2f} {spread:>10} {milliseconds:9.2f} ms')


def both_ways(function: Callable[..., Any], *arguments: Any) -> dict[str, Callable[[], Any]]:
  """Returns the compiled function, and it with the gradient of everything that it is given."""
  import jax

  def total(arguments, grad):
    out, pull = jax.vjp(function, *arguments)
    return out, pull(grad)

  grad = jax.jit(function)(*arguments)
  forward, backward = jax.jit(function), jax.jit(total)
  return {
    'forward': functools.partial(forward, *arguments),
    'with backward': functools.partial(backward, arguments, grad),
  }


def draw(*shape: int, seed: int = 0, dtype: str = 'float32') -> Any:
  """Returns normal numbers of variance 1 / fan-in."""
  import jax

  key = jax.random.key(seed)
  return jax.random.normal(key, shape, dtype) / shape[-2 if len(shape) > 1 else -1] ** 0.5


def dense_layers(hidden: int) -> dict[str, dict[str, Callable[[], Any]]]:
  """A dense SwiGLU of `hidden` units, in every layout and dtype."""
  import jax.numpy as jnp

  from deepseek_jax.ops.norm import swiglu

  def layer(joined: bool, turned: bool, x, *matrices):
    def product(x, w):
      return jnp.einsum('nd,fd->nf' if turned else 'nd,df->nf', x, w)

    if joined:
      gate, up = jnp.split(product(x, matrices[0]), 2, axis=1)
    else:
      gate, up = product(x, matrices[0]), product(x, matrices[1])
    return product(swiglu(gate, up), matrices[-1])

  found = {}
  ways = itertools.product(('float32', 'bfloat16'), (False, True), (False, True))
  for dtype, joined, turned in ways:
    width = WIDTH.value
    inward = [(width, 2 * hidden)] if joined else [(width, hidden)] * 2
    shapes = [*inward, (hidden, width)]
    x = draw(TOKENS.value, width, dtype=dtype)
    matrices = [draw(*(s[::-1] if turned else s), dtype=dtype) for s in shapes]
    name = f'dense {dtype}{", joined" if joined else ""}{", transposed" if turned else ""}'
    found[name] = both_ways(functools.partial(layer, joined, turned), x, *matrices)
  return found


def expert_layer(dtype: str, experts: int, top_k: int, hidden: int, **fields: Any) -> Any:
  """The whole layer: route, sort, experts, combine; its weights are arguments."""
  import flax.linen as nn
  import jax

  from deepseek_jax.layers.context import text_context
  from deepseek_jax.layers.moe.moe import MoE

  config = MoE(experts=experts, top_k=top_k, hidden=hidden, shared=None, balance=None, **fields)
  module, tokens = config.build(), jax.numpy.zeros((1, TOKENS.value), 'int32')
  context = text_context(tokens)
  x = draw(1, TOKENS.value, WIDTH.value, seed=1).astype(dtype)
  variables = nn.meta.unbox(jax.jit(module.init)(jax.random.key(0), x, context))
  # Routers stay in float32, as in training.
  params = {
    name: leaf if isinstance(leaf, dict) else leaf.astype(dtype)
    for name, leaf in variables['params'].items()
  }

  def layer(x, params):
    given = {**variables, 'params': params}
    return module.apply(given, x, context, mutable=['observed'])[0]

  return both_ways(layer, x, params)


def time_layer() -> None:
  """The whole layer beside the fastest dense layer of the same active FLOPs."""
  size = TOP_K.value * HIDDEN.value
  dense = dense_layers(size)
  sparse = {
    f'experts {dtype}': expert_layer(dtype, EXPERTS.value, TOP_K.value, HIDDEN.value)
    for dtype in DTYPES.value
  }
  print(
    f'{TOKENS.value} tokens of {WIDTH.value} channels; {TOP_K.value} of {EXPERTS.value} experts of '
    f'{HIDDEN.value} units, dense {size}: speeds by that of the fastest dense layer'
  )
  for way in ('forward', 'with backward'):
    taken = turns({name: calls[way] for name, calls in {**dense, **sparse}.items()})
    best = min(dense, key=lambda name: statistics.median(taken[name]))
    print(way)
    against(taken, best, [*sparse, *(name for name in dense if name != best)], faster=True)


def time_ragged() -> None:
  """The three products of the experts, ours and `jax.lax.ragged_dot`'s."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.ops.grouped_matmul import grouped_matmul, grouped_swiglu
  from deepseek_jax.ops.norm import swiglu

  rows, experts = TOKENS.value * TOP_K.value, EXPERTS.value
  chosen = jax.random.categorical(jax.random.key(3), jnp.zeros(experts), shape=(rows,))
  sizes = jnp.bincount(chosen, length=experts).astype(jnp.int32)

  def ours(x, gate, up, down):
    return grouped_matmul(grouped_swiglu(x, gate, up, sizes), down, sizes)

  def ragged(x, gate, up, down):
    product = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
    return product(swiglu(product(x, gate), product(x, up)), down)

  for dtype in DTYPES.value:
    x = draw(rows, WIDTH.value, dtype=dtype)
    inward = [draw(experts, WIDTH.value, HIDDEN.value, dtype=dtype, seed=s) for s in (1, 2)]
    down = draw(experts, HIDDEN.value, WIDTH.value, dtype=dtype, seed=3)
    made = {
      'ragged_dot': both_ways(ragged, x, *inward, down),
      'grouped_matmul': both_ways(ours, x, *inward, down),
    }
    for way in ('forward', 'with backward'):
      taken = turns({name: calls[way] for name, calls in made.items()})
      print(f'{rows} rows, {experts} experts, {dtype}, {way}: speeds by that of ragged_dot')
      against(taken, 'ragged_dot', ['grouped_matmul'], faster=True)


def time_granularity() -> None:
  """More and smaller experts at the same FLOPs a token: K · F is constant."""
  total = TOP_K.value * HIDDEN.value
  for dtype in DTYPES.value:
    made = {}
    for experts in (8, 16, 32, 64, 128, 256):
      top_k = max(experts // 8, 1)
      name = f'{top_k} of {experts} experts of {total // top_k}'
      made[name] = expert_layer(dtype, experts, top_k, total // top_k)
    base, *others = made
    for way in ('forward', 'with backward'):
      taken = turns({name: calls[way] for name, calls in made.items()})
      print(f'{TOKENS.value} tokens, {dtype}, {way}: times by that of the fewest experts')
      against(taken, base, others, faster=False)


def time_decode() -> None:
  """One token through K of E experts, beside dense layers that read the same bytes."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from deepseek_jax.ops.experts import ExpertWeights, apply_experts
  from deepseek_jax.ops.norm import swiglu

  experts, top_k, width, hidden = EXPERTS.value, TOP_K.value, WIDTH.value, HIDDEN.value
  generator = np.random.default_rng(0)
  chosen = [generator.choice(experts, top_k, replace=False) for _ in range(64)]
  weights = jnp.full((1, top_k), 1 / top_k, jnp.float32)

  def dense(x, matrices):
    return sum(swiglu(x @ g, x @ u) @ d for g, u, d in matrices) / top_k

  for dtype in DTYPES.value:
    x = draw(1, width, dtype=dtype)
    shapes = [(experts, width, hidden)] * 2 + [(experts, hidden, width)]
    stacks = ExpertWeights(*(draw(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes)))
    # The dense matrices are those of the experts, chosen alike: what is in the caches is the same.
    alone = [tuple(w[e] for w in stacks) for e in range(experts)]
    run, plain = jax.jit(apply_experts), jax.jit(dense)
    rows = [jnp.asarray(row, jnp.int32)[None] for row in chosen]
    sets = [[alone[e] for e in row] for row in chosen]
    taken = turns(
      {
        'dense products': functools.partial(_each, plain, [(x, given) for given in sets]),
        'experts': functools.partial(_each, run, [(x, row, weights, stacks) for row in rows]),
      }
    )
    print(f'64 single tokens, {top_k} of {experts} experts of {width} × {hidden}, {dtype}: times')
    against(taken, 'dense products', ['experts'], faster=False)


def time_routers() -> None:
  """The whole layer with each router; that of V3 is the base."""
  from deepseek_jax.layers.moe.router.balanced import Balanced
  from deepseek_jax.layers.moe.router.expert_attention import ExpertAttention
  from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
  from deepseek_jax.layers.moe.router.softmax import Softmax
  from deepseek_jax.layers.moe.router.sqrt_softplus import SqrtSoftplus

  routers = (Sigmoid(), Softmax(), SqrtSoftplus(), ExpertAttention(), Balanced())
  for dtype in DTYPES.value:
    sizes = EXPERTS.value, TOP_K.value, HIDDEN.value
    made = {type(router).__name__: expert_layer(dtype, *sizes, router=router) for router in routers}
    base, *others = made
    for way in ('forward', 'with backward'):
      taken = turns({name: calls[way] for name, calls in made.items()})
      print(f'{TOKENS.value} tokens, {sizes[1]} of {sizes[0]} experts, {dtype}, {way}: speeds')
      against(taken, base, others, faster=True)


def _each(function: Callable[..., Any], calls: list[Any]) -> list[Any]:
  """Calls it with each set of arguments, one after the other's end."""
  import jax

  return [jax.block_until_ready(function(*arguments)) for arguments in calls]


def main(argv: list[str]) -> None:
  """Runs the benchmark."""
  del argv
  {
    'layer': time_layer,
    'ragged': time_ragged,
    'granularity': time_granularity,
    'decode': time_decode,
    'routers': time_routers,
  }[WHAT.value]()


if __name__ == '__main__':
  app.run(main)
