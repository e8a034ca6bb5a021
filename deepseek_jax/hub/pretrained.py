"""A model with its weights: logits and text out, one part changed, a few steps further."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from deepseek_jax.convert.export import digest_of_vectors, parts_of, plan_files, write
from deepseek_jax.convert.load import Manifest
from deepseek_jax.convert.tokenizer import TEMPLATE
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override
from deepseek_jax.core.serialise import to_json
from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.data.tokenizer import Tokenizer, TokenizerFile
from deepseek_jax.infer.chat import Chat
from deepseek_jax.infer.chat_template import ChatTemplate
from deepseek_jax.infer.decode import Variables
from deepseek_jax.infer.generate import Decoding, OneByOne, TextGenerator, score
from deepseek_jax.infer.sample import Greedy, Sampler
from deepseek_jax.models.decoder import (
  Decoder,
  Family,
  canonical,
  grouped,
  init_variables,
)
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.deepseek_v4 import DeepSeekV4
from deepseek_jax.models.plan import Segment
from deepseek_jax.models.remat import Unrolled
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.step import build_program

CACHE_DIR = pathlib.Path('~/.cache/deepseek_jax')
"""Where tokens and pack plans of training data are kept unless told otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pretrained:
  """A model with weights; every method leaves it as it is.

  Attributes:
    experiment: the run that it comes from, as changed since.
    variables: `params` and `buffers`, nested dicts of arrays, as `decoder` takes them.
    step: training steps so far.
    fresh: addresses of weights that no training step has seen, such as
      `params/layers/0/attention/gate`.
    apart: `Unrolled()` where each layer has arrays of its own, which is faster on a CPU; None where
      layers lie together as the run trains them.
    template: how it was taught conversations, as Jinja, or None.
    manifest: of a published folder, what was done with each of its tensors.
  """

  experiment: Experiment
  variables: Variables
  step: int = 0
  fresh: tuple[str, ...] = ()
  apart: Unrolled | None = None
  template: str | None = None
  manifest: Manifest | None = None

  @functools.cached_property
  def decoder(self) -> Decoder:
    """The module: `decoder.apply(variables, context)`."""
    return decoder_of(self.experiment, self.apart)

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    """What makes tokens of text."""
    return self.experiment.data.tokenizer.build()

  @property
  def generator(self) -> TextGenerator:
    """Continues many texts at once, or as a stream."""
    return TextGenerator(decoder=self.decoder, variables=self.variables, tokenizer=self.tokenizer)

  @property
  def model(self) -> Family:
    """The config of the model."""
    return self.experiment.model

  def logits(self, prompt: str | Sequence[int] | np.ndarray | jax.Array) -> jax.Array:
    """Returns the float32 logits of the token after each token: [T, V], or [B, T, V] of rows.

    Args:
      prompt: token ids [T], or rows of them [B, T]; or a text, which becomes bos and its tokens.
    """
    if isinstance(prompt, str):
      return score(self.decoder, self.variables, [self.generator.encode(prompt)])[0]
    ids = np.asarray(prompt)
    if ids.ndim not in (1, 2):
      raise ConfigError(f'logits: found ids of shape {list(ids.shape)}, expected [T] or [B, T]')
    rows = score(self.decoder, self.variables, np.atleast_2d(ids).tolist())
    return rows[0] if ids.ndim == 1 else jnp.stack(rows)

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

  def chat(
    self,
    system: str | None = None,
    template: str | None = None,
    decoding: Decoding = OneByOne(),
  ) -> Chat:
    """Returns a conversation that has not begun: `model.chat().ask('Who are you?').reply.answer`.

    Args:
      system: what the model is told before it.
      template: Jinja, in the place of the model's own; see `infer.chat_template`.
      decoding: `Speculate()` drafts with the model's MTP modules.

    Raises:
      ConfigError: the model has no template, and none is given.
    """
    template = template or self.template
    if template is None:
      raise ConfigError(
        'chat: the model has no chat template; give one, such as infer.chat_template.PLAIN'
      )
    names = {i: text for text, i in self.tokenizer.marks().items()}
    bos, eos = (names.get(i, '') for i in (self.tokenizer.bos, self.tokenizer.eos))
    said = () if system is None else ({'role': 'system', 'content': system},)
    return Chat(
      generator=dataclasses.replace(self.generator, decoding=decoding),
      template=ChatTemplate(source=template, bos=bos, eos=eos),
      messages=said,
    )

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
    decoder = decoder_of(experiment, self.apart)
    variables, fresh = transplant(
      _canonical(self.variables, self.decoder), decoder, experiment.seed
    )
    still = (address for address in self.fresh if address in _addresses(decoder))
    return Pretrained(
      experiment=experiment,
      variables=variables,
      fresh=tuple(dict.fromkeys((*still, *fresh))),
      apart=self.apart,
      template=self.template,
    )

  def save(self, path: str | pathlib.Path) -> pathlib.Path:
    """Writes a checkpoint that `from_pretrained` reads, and that a run may begin with.

    Args:
      path: a folder, made if needed.

    Returns:
      The folder of the checkpoint.

    Raises:
      ConfigError: there is a checkpoint of this step already.
      DiskFullError: there is no room for it.
    """
    folder = pathlib.Path(path).expanduser().absolute() / 'checkpoints'
    with Checkpoints(folder) as checkpoints:
      state = regrouped(self.variables, segments_of(self.decoder), run_segments(self.experiment))
      checkpoints.save(self.step, state, {'step': self.step}, to_json(self.experiment))
    return folder / str(self.step)

  def export(
    self, path: str | pathlib.Path, dtype: str | None = None, largest: int = 5_000_000_000
  ) -> Iterator[str]:
    """Writes a folder in the layout of Hugging Face; yields the name of each tensor as it goes.

    Weights of multi-token prediction go to a file of their own, which only `from_pretrained` reads:
    other programs would take them for a mistake. What an attempt that was broken off has written is
    kept, and gone on with.

    Args:
      path: a new folder, or that of an earlier attempt.
      dtype: 'float32' or 'bfloat16', of the matrices; None is that in which they are here.
      largest: bytes of one file of tensors.

    Raises:
      ConfigError: no published model has such parts, or the folder holds something else.
    """
    segments = segments_of(self.decoder)
    model = self.experiment.model
    if not isinstance(model, DeepSeekV3 | DeepSeekV4):
      raise ConfigError(f'export: no published model is like {type(model).__name__}')
    parts = parts_of(self.variables, sorted(_addresses(self.decoder)), segments)
    kind = self.experiment.data.tokenizer
    # A published folder may have come without one.
    absent = isinstance(kind, TokenizerFile) and not pathlib.Path(kind.path).is_file()
    files = plan_files(
      model,
      parts,
      dtype or parts['params/embedding/weight'].dtype.name,
      self.experiment.data.length,
      None if absent else self.tokenizer,
    )
    if self.template is not None:
      files.texts[TEMPLATE] = self.template
    source = {
      'name': self.experiment.name,
      'step': self.step,
      'fresh': list(self.fresh),
      'vectors': digest_of_vectors(parts),
    }
    return write(pathlib.Path(path).expanduser().absolute(), files, source, largest)

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
    ours, theirs = segments_of(self.decoder), run_segments(self.experiment)
    given = regrouped(self.variables, ours, theirs)
    # Copies: the step gives the memory of its state away, and this model must stay whole.
    place = functools.partial(jax.tree.map, lambda x, like: _copy_to(like, x))
    state = dataclasses.replace(
      state,
      step=place(jnp.int32(self.step), state.step),
      params=place(given['params'], state.params),
      buffers=place(given['buffers'], state.buffers),
      # An average begins at the weights that training begins at.
      ema=state.ema and place(given['params'], state.ema),
    )
    losses = []
    batches = data.train_batches(self.step)
    for _ in range(steps):
      batch = jax.device_put(next(batches), program.batch_sharding)
      state, metrics = program.step(state, batch)
      losses.append(metrics['loss'])
    trained = Pretrained(
      experiment=self.experiment,
      variables=regrouped({'params': state.params, 'buffers': state.buffers}, theirs, ours),
      step=self.step + steps,
      apart=self.apart,
      template=self.template,
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
  wanted = flatten(_canonical(shapes_of(decoder), decoder))
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
  segments = segments_of(decoder)
  # A model may have no buffers at all, and then no address says that there is such a collection.
  return {name: grouped(tree.get(name, {}), segments) for name in ('params', 'buffers')}, fresh


def decoder_of(experiment: Experiment, apart: Unrolled | None = None) -> Decoder:
  """Returns the module of a run, with its layers grouped as in training unless `apart`."""
  dtype = jnp.dtype(experiment.precision.compute)
  if apart is not None:
    return experiment.model.build(dtype=dtype, remat=apart)
  return experiment.model.build(dtype=dtype, remat=experiment.remat, stages=experiment.stages)


def segments_of(decoder: Decoder) -> tuple[Segment, ...]:
  """Returns how the layers of a module are grouped."""
  return decoder.segments


def run_segments(experiment: Experiment) -> tuple[Segment, ...]:
  """Returns how the layers of a run are grouped, in training and in its checkpoints."""
  return experiment.segments


def regrouped(variables: Variables, old: Sequence[Segment], new: Sequence[Segment]) -> Variables:
  """Returns variables whose layers are grouped in another way."""
  if tuple(old) == tuple(new):
    return variables
  return {name: grouped(canonical(tree, old), new) for name, tree in variables.items()}


def shapes_of(decoder: Decoder) -> Variables:
  """Returns shapes and dtypes of a model's variables, as the decoder takes them."""
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  return nn.meta.unbox(boxed)


def _canonical(variables: Variables, decoder: Decoder) -> Variables:
  segments = segments_of(decoder)
  return {name: canonical(tree, segments) for name, tree in variables.items()}


def _addresses(decoder: Decoder) -> frozenset[str]:
  return frozenset(flatten(_canonical(shapes_of(decoder), decoder)))


def _copy_to(like: jax.Array, x: jax.Array) -> jax.Array:
  # What is learnt is float32, whatever format the weights were loaded in.
  return jax.device_put(x.astype(like.dtype), like.sharding, may_alias=False)
