"""Trained models: weights in, logits and text out, one part changed, a few steps further."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override
from deepseek_jax.core.serialise import from_json
from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.infer.decode import Variables
from deepseek_jax.infer.generate import Decoding, OneByOne, TextGenerator, score
from deepseek_jax.infer.sample import Greedy, Sampler
from deepseek_jax.models.decoder import (
  Decoder,
  canonical,
  grouped,
  init_variables,
  plan_segments,
)
from deepseek_jax.train.checkpoint_reader import (
  Weights,
  read_params,
  require_equal_trees,
  saved_steps,
  whole_step,
)
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.step import build_program

CACHE_DIR = pathlib.Path('~/.cache/deepseek_jax')
"""Where tokens and pack plans of training data are kept unless told otherwise."""


def from_pretrained(
  path: str | pathlib.Path, step: int | None = None, weights: Weights | None = None
) -> 'Pretrained':
  """Loads a trained model.

  Args:
    path: a run's workdir, or its folder of checkpoints.
    step: which checkpoint; None is the newest that is whole.
    weights: 'averaged' or 'raw'; None is the averaged ones where the run keeps any.

  Raises:
    ConfigError: there is no such checkpoint, it is damaged or cannot be read, or its weights do
      not fit the model that its config describes.
  """
  folder = pathlib.Path(path).expanduser().absolute()
  if (folder / 'checkpoints').is_dir():
    folder /= 'checkpoints'
  elif not saved_steps(folder):
    raise ConfigError(
      f"{folder}: holds no checkpoint; expected a run's workdir or its folder of checkpoints"
    )
  step = whole_step(folder, step)
  params, buffers, config = read_params(folder / str(step), weights)
  experiment = from_json(config)
  if not isinstance(experiment, Experiment):
    raise ConfigError(
      f'{folder / str(step)}: its config is no Experiment but {type(experiment).__name__}'
    )
  variables = {'params': params, 'buffers': buffers}
  require_equal_trees(folder / str(step), variables, _shapes(_decoder(experiment)))
  return Pretrained(
    experiment=experiment, variables=jax.tree.map(jnp.asarray, variables), step=step
  )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
  """A model with weights; every method leaves it as it is.

  Attributes:
    experiment: the run that it comes from, as changed since.
    variables: `params` and `buffers`, nested dicts of float32 arrays, as `decoder` takes them.
    step: training steps so far.
    fresh: addresses of weights that no training step has seen, such as
      `params/layers/0/attention/gate`.
  """

  experiment: Experiment
  variables: Variables
  step: int = 0
  fresh: tuple[str, ...] = ()

  @functools.cached_property
  def decoder(self) -> Decoder:
    """The module: `decoder.apply(variables, context)`."""
    return _decoder(self.experiment)

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """What makes tokens of text."""
    return self.experiment.data.tokenizer.build()

  @property
  def generator(self) -> TextGenerator:
    """Continues many texts at once, or as a stream."""
    return TextGenerator(decoder=self.decoder, variables=self.variables, tokenizer=self.tokenizer)

  def logits(self, prompt: str | Sequence[int] | np.ndarray) -> jax.Array:
    """Returns the float32 logits [T, V] of the token after each token.

    Args:
      prompt: token ids [T]; or a text, which becomes bos and its tokens.
    """
    ids = self.generator.encode(prompt) if isinstance(prompt, str) else list(prompt)
    return score(self.decoder, self.variables, [ids])[0]

  def generate(
    self,
    prompt: str,
    max_new_tokens: int = 64,
    sampler: Sampler = Greedy(),
    seed: int = 0,
    stop_texts: Sequence[str] = (),
    decoding: Decoding = OneByOne(),
  ) -> str:
    """Returns the continuation of a text, without the text.

    Args:
      prompt: beginning of a document.
      max_new_tokens: most tokens that are added.
      sampler: how a token is chosen.
      seed: of the draws.
      stop_texts: the continuation ends before the first of these.
      decoding: `Speculate()` drafts with the model's MTP modules: several tokens a step.
    """
    return ''.join(self.stream(prompt, max_new_tokens, sampler, seed, stop_texts, decoding))

  def stream(
    self,
    prompt: str,
    max_new_tokens: int = 64,
    sampler: Sampler = Greedy(),
    seed: int = 0,
    stop_texts: Sequence[str] = (),
    decoding: Decoding = OneByOne(),
  ) -> Iterator[str]:
    """Yields what `generate` returns, as it appears."""
    pieces = dataclasses.replace(self.generator, decoding=decoding).stream(
      [prompt], max_new_tokens=max_new_tokens, sampler=sampler, seed=seed, stop_texts=stop_texts
    )
    return (piece.text for piece in pieces if piece.text)

  def replace(self, **changes: Any) -> 'Pretrained':
    """Returns the model with parts changed, and the same weights wherever they still fit.

    Weights are kept where address (`layers/3/attention/output`) and shape agree; the others are
    new, and listed in `fresh`. The step starts over: what is trained next is another run.

    Args:
      changes: fields of the model's config. A part may be an object, or text such as
        `attention='Window(size=64)'`, which takes over the sizes of the part it replaces.

    Raises:
      ConfigError: with all that is wrong with the changes.
    """
    named = {f'model.{name}': value for name, value in changes.items()}
    experiment, _ = override(self.experiment, named)
    decoder = _decoder(experiment)
    variables, fresh = transplant(
      _canonical(self.variables, self.decoder), decoder, experiment.seed
    )
    still = (address for address in self.fresh if address in _addresses(decoder))
    return Pretrained(
      experiment=experiment,
      variables=variables,
      fresh=tuple(dict.fromkeys((*still, *fresh))),
    )

  def train(
    self, steps: int = 10, cache_dir: str | pathlib.Path = CACHE_DIR
  ) -> tuple['Pretrained', list[float]]:
    """Takes some training steps on the run's own data, on all devices.

    Batches go on after `step`. The optimizer begins anew, its learning rate warms up as at the
    beginning of the run: the state of another model would not fit one with a part changed.

    Args:
      steps: how many.
      cache_dir: folder for tokens and pack plans; made if needed.

    Returns:
      The trained model, and the loss of each step in nats a token, measured before its update.

    Raises:
      ConfigError: there are fewer than 1 steps, or the run does not fit these devices.
    """
    if steps < 1:
      raise ConfigError(f'steps: found {steps}, expected at least 1')
    program = build_program(self.experiment)
    data = self.experiment.data.prepare(pathlib.Path(cache_dir).expanduser())
    state = program.init(jax.random.key(self.experiment.seed))
    # Copies: the step gives the memory of its state away, and this model must stay whole.
    place = functools.partial(jax.tree.map, lambda x, like: _copy_to(like.sharding, x))
    state = dataclasses.replace(
      state,
      step=place(jnp.int32(self.step), state.step),
      params=place(self.variables['params'], state.params),
      buffers=place(self.variables['buffers'], state.buffers),
      # An average begins at the weights that training begins at.
      ema=state.ema and place(self.variables['params'], state.ema),
    )
    losses = []
    batches = data.train_batches(self.step)
    for _ in range(steps):
      batch = jax.device_put(next(batches), program.batch_sharding)
      state, metrics = program.step(state, batch)
      losses.append(metrics['loss'])
    trained = Pretrained(
      experiment=self.experiment,
      variables={'params': state.params, 'buffers': state.buffers},
      step=self.step + steps,
    )
    return trained, [float(loss) for loss in losses]


def transplant(layers: Variables, decoder: Decoder, seed: int) -> tuple[Variables, tuple[str, ...]]:
  """Gives a model the weights of another wherever address and shape agree.

  Args:
    layers: variables of the other model, by canonical address (`layers/<i>/…`).
    decoder: the model.
    seed: of the weights that are new.

  Returns:
    Variables as the decoder takes them, and the addresses of those that are new.
  """
  old = flatten(layers)
  wanted = flatten(_canonical(_shapes(decoder), decoder))
  fresh = tuple(
    address
    for address, leaf in wanted.items()
    if address not in old or old[address].shape != leaf.shape
  )

  @jax.jit
  def draw(key: jax.Array) -> dict[str, jax.Array]:
    # Only what is new leaves the function, so that nothing else is compiled.
    flat = flatten(_canonical(nn.meta.unbox(init_variables(decoder, key)), decoder))
    return {address: flat[address] for address in fresh}

  new = draw(jax.random.key(seed)) if fresh else {}
  tree = unflatten({address: new.get(address, old.get(address)) for address in wanted})
  segments = plan_segments(decoder.config, decoder.remat)
  # A model may have no buffers at all, and then no address says that there is such a collection.
  return {name: grouped(tree.get(name, {}), segments) for name in ('params', 'buffers')}, fresh


def _decoder(experiment: Experiment) -> Decoder:
  dtype = jnp.dtype(experiment.precision.compute)
  return experiment.model.build(dtype=dtype, remat=experiment.remat)


def _shapes(decoder: Decoder) -> Variables:
  """Shapes and dtypes of a model's variables, as the decoder takes them."""
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  return nn.meta.unbox(boxed)


def _canonical(variables: Variables, decoder: Decoder) -> Variables:
  segments = plan_segments(decoder.config, decoder.remat)
  return {name: canonical(tree, segments) for name, tree in variables.items()}


def _addresses(decoder: Decoder) -> frozenset[str]:
  return frozenset(flatten(_canonical(_shapes(decoder), decoder)))


def _copy_to(sharding: jax.sharding.Sharding, x: jax.Array) -> jax.Array:
  return jax.device_put(x, sharding, may_alias=False)
