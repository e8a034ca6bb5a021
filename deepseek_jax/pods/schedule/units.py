"""A model as a row of units, each a function of its weights: what a pipeline can be cut between."""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.batch import Batch
from deepseek_jax.layers.context import shift_left
from deepseek_jax.models.decoder import Decoder
from deepseek_jax.models.multimodal import Multimodal
from deepseek_jax.models.plan import Block
from deepseek_jax.models.stack import TransformerBlock
from deepseek_jax.ops.losses import chunked_cross_entropy
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.objective import batch_context, target_weights

Carry = dict[str, Any]
"""Between units: `stream` [B, T, …] and `losses` [], what layers have added so far."""


@dataclasses.dataclass(frozen=True)
class Data:
  """What every unit may read and none learns: constants of the backward pass.

  Attributes:
    batch: the microbatch, [B, T] arrays.
    buffers: by canonical address.
    divisors: [1 + depth] float32 targets of the whole batch, at every depth.
    rows: [] float32 rows of the whole batch.
  """

  batch: Batch
  buffers: Any
  divisors: jax.Array
  rows: jax.Array


jax.tree_util.register_dataclass(Data)


@dataclasses.dataclass(frozen=True)
class Unit:
  """A part of the model that stays together.

  Attributes:
    name: 'embedding', 'layers/3', 'head' or 'head and MTP'.
    key: units with equal keys run equal programs.
    addresses: where its weights lie in the canonical tree of parameters.
    run: (weights by address, carry, data) → carry; of the last, the loss [].
  """

  name: str
  key: Hashable
  addresses: tuple[str, ...]
  run: Callable[[dict[str, Any], Any, Data], Any]

  def weights(self, params: dict[str, Any]) -> dict[str, Any]:
    """Takes the unit's weights out of the canonical tree of parameters."""
    return {address: lookup(params, address) for address in self.addresses if _has(params, address)}


def lookup(tree: Any, address: str) -> Any:
  """Returns what lies at an address such as 'layers/3'."""
  for part in address.split('/'):
    tree = tree[part]
  return tree


def _has(tree: Any, address: str) -> bool:
  for part in address.split('/'):
    if part not in tree:
      return False
    tree = tree[part]
  return True


def model_units(experiment: Experiment) -> list[Unit]:
  """Returns embedding, layers, and the head with its loss and the modules of MTP.

  Those come last and stay together, since MTP reads the last layer and uses the same head. It also
  embeds tokens: the embedding's weights are among those of the last unit too, and their gradients
  are to be added, unless one device holds both.

  Raises:
    ConfigError: the model has an encoder, or its layers need more than their tokens.
  """
  if isinstance(experiment.model, Multimodal):
    raise ConfigError('model is Multimodal; a pipeline is planned for models of text alone')
  decoder = experiment.model.build(dtype=jnp.dtype(experiment.precision.compute))
  layers = experiment.model.layers()
  units = [Unit('embedding', 'embedding', ('embedding', 'open'), _embedding(experiment, decoder))]
  for number, block in enumerate(layers):
    address = f'layers/{number}'
    run = _layer(experiment, block, address)
    units.append(Unit(address, (block, experiment.remat is None), (address,), run))
  mtp = experiment.model.mtp
  depth = 0 if mtp is None else mtp.depth
  addresses = ('close', 'norm', 'head', *(f'mtp_{k}' for k in range(depth)))
  name = 'head and MTP' if depth else 'head'
  addresses += ('embedding',) if depth else ()
  return [*units, Unit(name, name, addresses, _head(experiment, decoder, depth))]


def join(units: Sequence[Unit]) -> Unit:
  """Returns several neighbouring units as one, such as a stage of a pipeline."""

  def run(weights: dict[str, Any], carry: Any, data: Data) -> Any:
    for unit in units:
      mine = {address: weights[address] for address in unit.addresses if address in weights}
      carry = unit.run(mine, carry, data)
    return carry

  addresses = tuple(dict.fromkeys(a for unit in units for a in unit.addresses))
  name = units[0].name if len(units) == 1 else f'{units[0].name} to {units[-1].name}'
  return Unit(name, tuple(unit.key for unit in units), addresses, run)


def stream_shape(experiment: Experiment, params: Any, data: Data) -> Carry:
  """Returns the shapes of what goes from unit to unit, [B, T, …], for canonical parameters."""
  unit = model_units(experiment)[0]
  return jax.eval_shape(unit.run, unit.weights(params), {}, data)


def _context(experiment: Experiment, batch: Batch) -> Any:
  return batch_context(batch, experiment.rules)


def _embedding(experiment: Experiment, decoder: Decoder):
  def begin(module: Decoder, context: Any) -> Any:
    return module.open.open(module.embed(context.tokens, context))

  def run(weights: dict[str, Any], carry: Any, data: Data) -> Carry:
    del carry
    context = _context(experiment, data.batch)
    stream = decoder.apply({'params': weights}, context, method=begin)
    return {'stream': stream, 'losses': jnp.float32(0)}

  return run


def _layer(experiment: Experiment, block: Block, address: str):
  module = TransformerBlock(block)

  def run(weights: dict[str, Any], carry: Carry, data: Data) -> Carry:
    context = _context(experiment, data.batch)
    buffers = lookup(data.buffers, address) if _has(data.buffers, address) else {}

    def apply(params: Any, stream: Any) -> tuple[Any, jax.Array]:
      variables = {'params': params, 'buffers': buffers}
      (stream, _), told = module.apply(variables, stream, context, mutable=['losses', 'observed'])
      added = (jnp.sum(x) for x in jax.tree.leaves(told.get('losses', {})))
      return stream, sum(added, jnp.float32(0))

    if experiment.remat is not None:
      apply = jax.checkpoint(apply)
    stream, added = apply(weights[address], carry['stream'])
    return {'stream': stream, 'losses': carry['losses'] + added}

  return run


def _head(experiment: Experiment, decoder: Decoder, depth: int):
  mtp_weight = experiment.objective.build(experiment.train_steps)(jnp.int32(0))

  def finish(module: Decoder, stream: Any, context: Any) -> tuple[list[jax.Array], jax.Array]:
    hiddens, mtp = [module.finish(stream)], module.config.mtp
    if mtp is not None:
      state = mtp.start(stream, hiddens[0])
      for k in range(1, depth + 1):
        tokens = shift_left(context.tokens, k)
        state, hidden, _ = module.ahead(k, state, tokens, context)
        hiddens.append(hidden)
    return hiddens, module.head_matrix()

  def run(weights: dict[str, Any], carry: Carry, data: Data) -> jax.Array:
    context = _context(experiment, data.batch)
    buffers = {k: v for k, v in data.buffers.items() if k.startswith('mtp_')}
    (hiddens, head), told = decoder.apply(
      {'params': weights, 'buffers': buffers},
      carry['stream'],
      context,
      method=finish,
      mutable=['losses', 'observed'],
    )
    batch, counts = data.batch, target_weights(data.batch, depth)
    losses = [
      chunked_cross_entropy(
        hidden, head, shift_left(batch.targets, k), counts[k], experiment.objective.chunk
      )
      / data.divisors[k]
      for k, hidden in enumerate(hiddens)
    ]
    added = (jnp.sum(x) for x in jax.tree.leaves(told.get('losses', {})))
    auxiliary = (carry['losses'] + sum(added, jnp.float32(0))) / data.rows
    mtp = sum(losses[1:], jnp.float32(0)) / max(depth, 1)
    return losses[0] + mtp_weight * mtp + auxiliary

  return run
