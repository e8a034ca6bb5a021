"""What sharing the tokens of a row among eight devices costs: memory, messages and balance.

  python scripts/bench_context.py [--what=attention,balance] [--kinds=mla,…] [--length=8192]

attention: one layer, forward and gradient, compiled for eight host devices with the row over all of
them; nothing is run. Temporaries are the compiler's plan for a CPU; messages are the bytes that a
device receives, read off the compiled program with loops counted as often as they run. `part` is
the compiler's own way, `gather` and `ring` are kinds of `context_parallel`; attention that sees a
bounded part of the row has one form, `ours`.

balance: pairs of a query and a key that it sees, of the busiest device over the mean.
"""

import os
from typing import Any

from absl import app, flags

DEVICES = 8
FORMS = {'part': 'Partitioned', 'gather': 'AllGather', 'ring': 'Ring'}
DENSE = ('mla', 'mha')

WHAT = flags.DEFINE_list('what', ['attention', 'balance'], 'of attention, balance')
CHOSEN = flags.DEFINE_list('kinds', None, 'kinds of attention; all if not said')
LENGTH = flags.DEFINE_integer('length', 8192, 'tokens of the row')


def kinds() -> dict[str, Any]:
  """Returns attention kinds at an eighth of the width of DeepSeek-V3 and V4-Flash."""
  from deepseek_jax.layers.attention.csa import CSA
  from deepseek_jax.layers.attention.gated import Gated, Log
  from deepseek_jax.layers.attention.hca import HCA
  from deepseek_jax.layers.attention.indexer import Indexer
  from deepseek_jax.layers.attention.latent import MLA
  from deepseek_jax.layers.attention.mha import MHA
  from deepseek_jax.layers.attention.nsa import NSA
  from deepseek_jax.layers.attention.shared_window import SharedWindow
  from deepseek_jax.layers.attention.sparse import DSA
  from deepseek_jax.layers.attention.top_k import TopK
  from deepseek_jax.layers.attention.window import Window

  latent: dict[str, Any] = {'heads': 16, 'query_latent': 192}
  shared: dict[str, Any] = {'heads': 8, 'head_dim': 128, 'query_latent': 128, 'group_dim': 128}
  return {
    'mla': MLA(**latent),
    'mha': MHA(heads=16, kv_heads=4),
    'window': Window(**latent, size=512),
    'dsa': DSA(**latent, top_k=256, indexer=Indexer(heads=8, dim=64)),
    'top_k': TopK(**latent, top_k=256),
    'gated': Gated(**latent, keep=Log(factor=16.0)),
    'nsa': NSA(heads=16),
    'shared_window': SharedWindow(**shared),
    'csa': CSA(**shared, top_k=128, index_heads=8, index_dim=64),
    'hca': HCA(**shared),
  }


def layer_costs(kind: Any, form: str, length: int) -> tuple[int, dict[str, int]]:
  """Returns bytes of temporaries and bytes received, of a layer and its gradient [1, T, 896]."""
  import flax.linen as nn
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding

  from deepseek_jax.layers import context_parallel
  from deepseek_jax.layers.context import Context, text_context
  from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
  from deepseek_jax.sharding.rules import Rules
  from scripts.collective_bytes import moved_bytes

  # Weights are whole, so that what is counted is the row's.
  rules, module = Rules(seq=('seq',)), kind.build()
  parallel = getattr(context_parallel, FORMS[form])()
  plain = text_context(jnp.zeros((1, 2), jnp.int32))
  boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2, 896)), plain)
  params = nn.meta.unbox(boxed)['params']

  def loss(params, x, facts):
    names = 'tokens', 'positions', 'segments'
    context = Context(**dict(zip(names, facts, strict=True)), rules=rules, parallel=parallel)
    (y, _), reported = module.apply({'params': params}, x, context, mutable=['losses'])
    return jnp.sum(y * y) + sum(jax.tree.leaves(reported), jnp.float32(0))

  mesh = make_mesh(MeshConfig(seq=DEVICES))
  with jax.set_mesh(mesh):
    place = lambda axes: NamedSharding(mesh, rules.spec(axes))  # noqa: E731
    whole = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place([])), params
    )
    tokens = place(('batch', 'seq'))
    fact = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=tokens)
    x = jax.ShapeDtypeStruct((1, length, 896), jnp.float32, sharding=tokens)
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(whole, x, (fact,) * 3).compile()
  weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert text is not None
  assert memory is not None
  moved = moved_bytes(text)
  # The sum of the weights' gradients is of every form.
  moved['weights'] = 2 * weights * (DEVICES - 1) // DEVICES
  return memory.temp_size_in_bytes, moved


def print_attention(length: int, names: list[str]) -> None:
  """Prints a row for each kind and form."""
  print(f'one layer and its gradient, a row of {length} on {DEVICES} devices, float32: MB a device')
  print(f'{"":<22}{"temporary":>10}{"received":>10}  of which')
  for name in names:
    kind = kinds()[name]
    for form in FORMS:
      if form == 'gather' and name not in DENSE:
        continue
      temporary, moved = layer_costs(kind, form, length)
      weights = moved.pop('weights')
      parts = ', '.join(f'{kind} {size / 1e6:.1f}' for kind, size in sorted(moved.items()) if size)
      total = sum(moved.values()) / 1e6
      label = 'ours' if form == 'ring' and name not in DENSE else form
      print(f'{name:<14}{label:<8}{temporary / 1e6:>10.1f}{total:>10.1f}  {parts}', flush=True)
    print(f'{"":<14}gradients of weights, in all of these: {weights / 1e6:.1f}', flush=True)


def print_balance(length: int) -> None:
  """Prints pairs of the busiest device over the mean."""
  import numpy as np

  from deepseek_jax.layers.context import packed_context
  from deepseek_jax.layers.context_parallel import Contiguous, ZigZag, count_pairs, imbalance

  generator = np.random.default_rng(0)
  documents: list[int] = []
  while sum(documents) < length:
    size = int(generator.lognormal(np.log(length / 16), 1.0)) + 1
    documents.append(min(size, length - sum(documents)))
  rows = {'one document': [length], f'{len(documents)} documents': documents}
  print(f'pairs of the busiest device over the mean, a row of {length}; and where all wait for the')
  print('busiest after every step of a ring')
  print(f'{"":<16}{"devices":>8}{"Contiguous":>12}{"its ring":>10}{"ZigZag":>10}{"its ring":>10}')
  for name, lengths in rows.items():
    context = packed_context([lengths], length)
    facts = np.asarray(context.positions), np.asarray(context.segments)
    for devices in (2, 4, 8):
      found = [
        ratio
        for order in (Contiguous(), ZigZag())
        for ratio in imbalance(count_pairs(*facts, order, devices))
      ]
      numbers = ''.join(f'{x:>{width}.3f}' for x, width in zip(found, (12, 10, 10, 10)))
      print(f'{name:<16}{devices:>8}{numbers}')


def main(argv: list[str]) -> None:
  """Prints the tables that are asked for."""
  del argv
  os.environ['XLA_FLAGS'] = (
    f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={DEVICES}'
  )
  os.environ['JAX_PLATFORMS'] = 'cpu'
  if 'balance' in WHAT.value:
    print_balance(LENGTH.value)
  if 'attention' in WHAT.value:
    print_attention(LENGTH.value, CHOSEN.value or list(kinds()))


if __name__ == '__main__':
  app.run(main)
