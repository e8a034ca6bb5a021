"""How fast a training step could be if it were nothing but its matrix products.

The products are read from the step's program before compilation, each with the times it is run; a
machine's best time for each, summed, is the composed roof of the step.
"""

import collections
import dataclasses
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core


class Product(NamedTuple):
  """One shape of matrix product, with its layout and dtype.

  Attributes:
    left: shape of the first operand.
    right: shape of the second.
    dimensions: contracted and batch axes, as `jax.lax.dot_general` takes them.
    dtype: of the operands.
    output: dtype of the result.
  """

  left: tuple[int, ...]
  right: tuple[int, ...]
  dimensions: Any
  dtype: str
  output: str

  @property
  def flops(self) -> float:
    """Floating point operations of one run."""
    (contracted, _), (batch, _) = self.dimensions
    inner = math.prod(self.left[axis] for axis in contracted)
    batches = math.prod(self.left[axis] for axis in batch)
    return 2.0 * math.prod(self.left) * math.prod(self.right) / inner / batches


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvenLoads:
  """A dispatch for counting only: each expert gets as many rows, with no sorting and no padding."""

  def check(self, experts: int, sizes: Any, rules: Any) -> list[str]:
    """Returns what is wrong with it on a mesh: nothing, as it is never run."""
    del experts, sizes, rules
    return []

  def __call__(
    self, x: jax.Array, assignment: Any, matrices: Any, context: Any
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Multiplies [N, D] as rows [E, N · K / E, D]; the result [N, D] means nothing."""
    del context
    experts, (tokens, top_k) = matrices.gate.shape[0], assignment.experts.shape
    pairs, width = tokens * top_k, x.shape[1]
    each = -(-pairs // experts)
    rows = jnp.pad(jnp.repeat(x, top_k, axis=0), ((0, each * experts - pairs), (0, 0)))
    rows = rows.reshape(experts, each, width)
    hidden = jax.nn.silu(jnp.einsum('erd,edf->erf', rows, matrices.gate))
    hidden *= jnp.einsum('erd,edf->erf', rows, matrices.up)
    out = jnp.einsum('erf,efd->erd', hidden, matrices.down).reshape(-1, width)[:pairs]
    out = out.reshape(tokens, top_k, width)
    return jnp.sum(out * assignment.weights[..., None].astype(x.dtype), axis=1), {}


def products_of(function: Any, *arguments: Any) -> dict[Product, int]:
  """Returns the matrix products of a function and how often each is run.

  Raises:
    ValueError: a product is in a loop whose length the program does not tell.
  """
  return dict(products_of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr))


def products_of_jaxpr(jaxpr: Any) -> collections.Counter[Product]:
  """Returns the matrix products of a traced function, as `products_of` does."""
  counts: collections.Counter[Product] = collections.Counter()
  _collect(jaxpr, 1, counts)
  return counts


def _collect(jaxpr: Any, times: int, counts: collections.Counter[Product]) -> None:
  for equation in jaxpr.eqns:
    name, parameters = equation.primitive.name, equation.params
    if name == 'dot_general':
      left, right, output = (v.aval for v in (*equation.invars, *equation.outvars))
      dimensions = parameters['dimension_numbers']
      product = Product(left.shape, right.shape, dimensions, str(left.dtype), str(output.dtype))
      counts[product] += times
      continue
    inner: collections.Counter[Product] = collections.Counter()
    if name == 'cond':
      # The dear branch is that of a step that counts; the other skips it.
      branches = [products_of_jaxpr(branch.jaxpr) for branch in parameters['branches']]
      inner = max(branches, key=lambda found: sum(p.flops * n for p, n in found.items()))
      parameters = {}
    for value in jax.tree.leaves(
      list(parameters.values()), is_leaf=lambda x: isinstance(x, core.Jaxpr | core.ClosedJaxpr)
    ):
      if isinstance(value, core.ClosedJaxpr):
        _collect(value.jaxpr, 1, inner)
      elif isinstance(value, core.Jaxpr):
        _collect(value, 1, inner)
    if inner and name == 'while':
      raise ValueError(f'{len(inner)} matrix products are inside a `{name}`: how often is unknown')
    repeats = times * (parameters['length'] if name == 'scan' else 1)
    for product, count in inner.items():
      counts[product] += repeats * count


class Roof:
  """Compiled products of a step, to be timed one round after another."""

  def __init__(self, counts: dict[Product, int]):
    """Compiles every product and runs it once."""
    self.counts = counts
    self.seconds: dict[Product, list[float]] = {product: [] for product in counts}
    self._runs: dict[Product, Any] = {}
    for product in counts:
      keys = jax.random.split(jax.random.key(0))
      operands = [
        jax.random.normal(key, shape, product.dtype)
        for key, shape in zip(keys, (product.left, product.right), strict=True)
      ]
      dot = jax.jit(
        lambda a, b, product=product: jax.lax.dot_general(
          a, b, product.dimensions, preferred_element_type=product.output
        )
      )
      jax.block_until_ready(dot(*operands))
      self._runs[product] = (dot, operands)

  def round(self) -> None:
    """Times every product once."""
    for product, (dot, operands) in self._runs.items():
      start = time.perf_counter()
      jax.block_until_ready(dot(*operands))
      self.seconds[product].append(time.perf_counter() - start)

  def step_seconds(self, choose: Any) -> float:
    """Returns the roof in seconds a step, with `choose` (min, median) over the rounds."""
    return sum(count * choose(self.seconds[product]) for product, count in self.counts.items())

  def table(self, choose: Any, rows: int = 12) -> str:
    """Returns the products that take longest: times run, shapes, GFLOP/s, share."""
    total = self.step_seconds(choose)
    lines = ['  runs  GFLOP/s  share  product']
    spent = {p: n * choose(self.seconds[p]) for p, n in self.counts.items()}
    for product in sorted(spent, key=lambda p: -spent[p])[:rows]:
      rate = self.counts[product] * product.flops / spent[product] / 1e9
      (contracted, _), (batch, _) = product.dimensions
      shape = f'{list(product.left)} · {list(product.right)} over axes {list(contracted)}'
      shape += f', batch {list(batch)}' if batch else ''
      lines.append(
        f'  {self.counts[product]:4}  {rate:7.1f}  {spent[product] / total:5.1%}  {shape}'
      )
    return '\n'.join(lines)
