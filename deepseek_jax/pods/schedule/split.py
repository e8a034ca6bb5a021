"""Cuts a differentiated function in three: forward, gradient of its input, gradient of its weights.

A transposed function makes both gradients at once. A zero-bubble schedule wants that of the input
first, since another device waits for it, and that of the weights whenever there is nothing better
to do. The three programs here are one traced program, cut by what each result needs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

INLINED = ('jit', 'pjit', 'closed_call', 'core_call', 'checkpoint', 'remat2')
"""Primitives that only hold other equations, which may belong to different parts."""

LOOPS = ('while', 'scan')
"""Primitives whose results a compiler can leave out one by one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
  """A function of (weights, input, data) with its backward pass in two parts.

  Attributes:
    forward: (weights, input, data) → (output, kept): what the function gives, and arrays that the
      backward pass needs beside weights and data.
    backward_input: (weights, data, kept, cotangent) → (gradient of the input, left): `left` is
      what the gradient of the weights needs, the cotangent and some of `kept` among it.
    backward_weight: (weights, data, left) → gradient of the weights.
    backward: (weights, data, kept, cotangent) → (gradient of the input, gradient of the weights).
    kept_bytes: of `kept`.
    left_bytes: of `left`.
  """

  forward: Callable[..., tuple[Any, tuple[jax.Array, ...]]]
  backward_input: Callable[..., tuple[Any, tuple[jax.Array, ...]]]
  backward_weight: Callable[..., Any]
  backward: Callable[..., tuple[Any, Any]]
  kept_bytes: int
  left_bytes: int


def split(function: Callable[..., Any], weights: Any, x: Any, data: Any, platform: str) -> Split:
  """Splits a function `(weights, x, data) -> y`; weights and x are floating, data is constant.

  A loop that makes both gradients is run in both parts, each for its own results alone: the
  compiler leaves out what the others would need. What they share inside the loop is done twice.

  Args:
    function: what to differentiate.
    weights: pytree of arrays or shapes.
    x: pytree of arrays or shapes.
    data: pytree of arrays or shapes.
    platform: of the devices it will run on, such as 'cpu': one path of what differs by platform is
      taken now, so that its equations can be told apart.

  Raises:
    NotImplementedError: what differs by platform has no path for this one.
  """

  def all_of(weights, x, data, cotangent):
    y, pull = jax.vjp(lambda weights, x: function(weights, x, data), weights, x)
    for_weights, for_x = pull(cotangent)
    return y, for_x, for_weights

  y = jax.eval_shape(function, weights, x, data)
  closed, shapes = jax.make_jaxpr(all_of, return_shape=True)(weights, x, data, y)
  parts = _Parts(_Program(closed, platform), (weights, x, data, y), shapes)
  return Split(
    forward=parts.forward,
    backward_input=parts.backward_input,
    backward_weight=parts.backward_weight,
    backward=parts.backward,
    kept_bytes=_bytes(parts.kept),
    left_bytes=_bytes(parts.left),
  )


class _Parts:
  """A flat program of (output, gradient of the input, of the weights), and what each part does."""

  def __init__(self, program: '_Program', inputs: Sequence[Any], shapes: Sequence[Any]):
    self.program = program
    self.trees = [jax.tree.structure(shape) for shape in shapes]
    self.weights, self.x, self.data, self.cotangent = _cut(inputs, program.inputs)
    self.y, self.for_x, self.for_weights = _cut(shapes, program.outputs)
    program.set_apart({*self.weights, *self.data, *program.constants})
    self.first, rest = program.needed(self.y, program.equations)
    self.both, _ = program.needed([*self.for_x, *self.for_weights], rest)
    self.second, _ = program.needed(self.for_x, rest)
    again = map(_repeater(self.second, self.for_x), self.both)
    self.third, _ = program.needed(self.for_weights, [e for e in again if e is not None])
    always = {*self.weights, *self.data, *program.constants}
    always |= {name for equation in program.fixed for name in equation.makes}
    results = [*self.for_x, *self.for_weights]
    self.kept = _read(self.both, results, always | {*self.cotangent})
    self.left = _read(self.third, self.for_weights, always)

  def forward(self, weights, x, data):
    named = _named((self.weights, weights), (self.x, x), (self.data, data))
    found = self.program.run(self.first, named, [*self.y, *self.kept])
    size = len(self.y)
    return jax.tree.unflatten(self.trees[0], found[:size]), tuple(found[size:])

  def backward_input(self, weights, data, kept, cotangent):
    named = self._given(weights, data, kept, cotangent)
    found = self.program.run(self.second, named, [*self.for_x, *self.left])
    size = len(self.for_x)
    return jax.tree.unflatten(self.trees[1], found[:size]), tuple(found[size:])

  def backward_weight(self, weights, data, left):
    named = _named((self.weights, weights), (self.data, data), (self.left, left))
    return jax.tree.unflatten(self.trees[2], self.program.run(self.third, named, self.for_weights))

  def backward(self, weights, data, kept, cotangent):
    named = self._given(weights, data, kept, cotangent)
    found = self.program.run(self.both, named, [*self.for_x, *self.for_weights])
    for_x, for_weights = found[: len(self.for_x)], found[len(self.for_x) :]
    return jax.tree.unflatten(self.trees[1], for_x), jax.tree.unflatten(self.trees[2], for_weights)

  def _given(self, weights, data, kept, cotangent):
    return _named(
      (self.weights, weights), (self.data, data), (self.kept, kept), (self.cotangent, cotangent)
    )


class _Equation:
  """One operation: what it reads, what it makes, and how to do it."""

  def __init__(self, equation, reads, makes):
    self.equation, self.reads, self.makes = equation, reads, makes

  def __call__(self, values: list[Any]) -> list[Any]:
    primitive = self.equation.primitive
    found = primitive.bind(*values, **primitive.get_bind_params(self.equation.params))
    return list(found) if primitive.multiple_results else [found]


class _Name:
  """A value of the flat program."""

  def __init__(self, aval):
    self.aval = aval


def _repeater(input_eqns: Sequence[_Equation], results: Sequence[_Name]):
  """Returns the function that says what of an equation is left for the gradient of the weights.

  Equations that the gradient of the input does not need are left as they are. Those that it needs
  are done by then, but for loops: whatever they make beside is made by a second run.
  """
  first = set(input_eqns)
  used = {name for equation in input_eqns for name in equation.reads} | set(results)

  def left(equation: _Equation) -> _Equation | None:
    if equation not in first:
      return equation
    beside = [name for name in equation.makes if name not in used]
    if equation.equation.primitive.name not in LOOPS or not beside:
      return None
    # What the first run made is there already, under the names that it has.
    makes = [name if name in beside else _Name(name.aval) for name in equation.makes]
    return _Equation(equation.equation, equation.reads, makes)

  return left


class _Program:
  """A traced function as one flat list of equations, those of inner functions among them."""

  def __init__(self, closed, platform: str):
    self.platform = platform
    self.equations: list[_Equation] = []
    self.fixed: list[_Equation] = []
    self.constants: dict[_Name, Any] = {}
    jaxpr = closed.jaxpr
    self.inputs = [_Name(var.aval) for var in jaxpr.invars]
    names = dict(zip(jaxpr.invars, self.inputs, strict=True))
    self.outputs = self._add(jaxpr, closed.consts, names)

  def _constant(self, value: Any, aval: Any) -> _Name:
    name = _Name(aval)
    self.constants[name] = value
    return name

  def _add(self, jaxpr, consts: Sequence[Any], names: dict) -> list[_Name]:
    """Adds the equations of a function; returns the names of its results."""
    for var, value in zip(jaxpr.constvars, consts, strict=True):
      names[var] = self._constant(value, var.aval)

    def name(atom):
      if isinstance(atom, Literal):
        return self._constant(atom.val, atom.aval)
      return names[atom]

    for equation in jaxpr.eqns:
      kind, params = equation.primitive.name, equation.params
      reads = [name(atom) for atom in equation.invars]
      inner, inner_consts = None, ()
      if kind in INLINED:
        inner = params['jaxpr']
      elif kind == 'cond' and params.get('branches_platforms') is not None:
        inner, reads = self._branch(params), reads[1:]
      if inner is not None:
        if hasattr(inner, 'jaxpr'):
          inner, inner_consts = inner.jaxpr, inner.consts
        found = self._add(inner, inner_consts, dict(zip(inner.invars, reads, strict=True)))
        names.update(zip(equation.outvars, found, strict=True))
        continue
      makes = [_Name(var.aval) for var in equation.outvars]
      names.update(zip(equation.outvars, makes, strict=True))
      self.equations.append(_Equation(equation, reads, makes))
    return [name(atom) for atom in jaxpr.outvars]

  def _branch(self, params: dict[str, Any]) -> Any:
    """The path of what differs by platform that is taken on this one."""
    for platforms, branch in zip(params['branches_platforms'], params['branches'], strict=True):
      if platforms is None or self.platform in platforms:
        return branch
    raise NotImplementedError(f'no path for {self.platform}: {params["branches_platforms"]}')

  def set_apart(self, known: set[_Name]) -> None:
    """Moves equations that depend on nothing but what is known to `fixed`.

    Casts of weights, masks and angles are among them: every part makes them anew, since keeping
    them would cost each microbatch the memory.
    """
    known, others = set(known), []
    for equation in self.equations:
      if known.issuperset(equation.reads):
        known.update(equation.makes)
        self.fixed.append(equation)
      else:
        others.append(equation)
    self.equations = others

  def needed(self, results, equations) -> tuple[list[_Equation], list[_Equation]]:
    """Parts equations into those that results need and the others, both in order."""
    wanted, mine = set(results), set()
    for equation in reversed(equations):
      if wanted.intersection(equation.makes):
        wanted.update(equation.reads)
        mine.add(equation)
    return [e for e in equations if e in mine], [e for e in equations if e not in mine]

  def run(self, equations, values: dict[_Name, Any], results) -> list[Any]:
    """Does equations on named values; returns those named in `results`."""
    reads = [name for equation in equations for name in equation.reads]
    fixed, _ = self.needed([*reads, *results], self.fixed)

    def value(name):
      return self.constants[name] if name in self.constants else values[name]

    for equation in [*fixed, *equations]:
      found = equation([value(name) for name in equation.reads])
      values.update(zip(equation.makes, found, strict=True))
    return [value(name) for name in results]


def _cut(trees: Sequence[Any], names: list[_Name]) -> list[list[_Name]]:
  """Cuts a flat list as long as the leaves of all trees into one a tree."""
  found, start = [], 0
  for tree in trees:
    size = len(jax.tree.leaves(tree))
    found.append(names[start : start + size])
    start += size
  return found


def _named(*pairs: tuple[Sequence[_Name], Any]) -> dict[_Name, Any]:
  """Names the leaves of trees."""
  return {
    name: leaf
    for names, tree in pairs
    for name, leaf in zip(names, jax.tree.leaves(tree), strict=True)
  }


def _read(equations, results, known) -> list[_Name]:
  """What equations and results need from before, each once, in order."""
  made = {name for equation in equations for name in equation.makes}
  read = [name for equation in equations for name in equation.reads]
  return [name for name in dict.fromkeys([*read, *results]) if name not in made | known]


def _bytes(names: Sequence[_Name]) -> int:
  return sum(name.aval.size * jnp.dtype(name.aval.dtype).itemsize for name in names)
