"""Where a trained model comes from: one of our runs, a published folder, or a repository."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import SingleDeviceSharding

from deepseek_jax.convert.architecture import model_of
from deepseek_jax.convert.load import addresses, load, prepare
from deepseek_jax.convert.published import open_published
from deepseek_jax.convert.tokenizer import read_json, template_of, tokenizer_of
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.precision import BFloat16, Float32, Precision
from deepseek_jax.core.serialise import from_json
from deepseek_jax.core.tree import flatten, unflatten
from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.data.progress import Progress, say
from deepseek_jax.hub.pretrained import (
  Pretrained,
  decoder_of,
  regrouped,
  segments_of,
  shapes_of,
)
from deepseek_jax.infer.decode import Variables
from deepseek_jax.models.decoder import Decoder, init_variables
from deepseek_jax.models.plan import Segment, locate
from deepseek_jax.models.remat import Unrolled
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.sharding.mesh import MeshConfig, make_mesh
from deepseek_jax.sharding.rules import (
  Rules,
  check_divisible,
  logical_axes,
  tree_shardings,
  tree_specs,
)
from deepseek_jax.train.checkpoint_reader import (
  Weights,
  read_params,
  require_equal_trees,
  saved_steps,
  whole_step,
)
from deepseek_jax.train.experiment import Experiment

PRECISIONS: dict[str, Precision] = {'float32': Float32(), 'bfloat16': BFloat16()}
FILES = ['*.json', '*.safetensors', '*.jinja']
"""Files of a repository that are downloaded."""
REPOSITORY = re.compile(r'[\w.-]+/[\w.-]+')
EXACT = re.compile(r'/(router|mixer)/|/close/|/indexer/weights$|/position_bias$|^buffers/')
"""Arrays that stay float32 whatever the matrices are: what routes, mixes lanes, or is added."""
ROW = 512
"""Most tokens of a row when a published model is trained further."""


def from_pretrained(
  path: str | pathlib.Path,
  step: int | None = None,
  weights: Weights | None = None,
  *,
  dtype: str | None = None,
  overrides: Mapping[str, Any] | None = None,
  mesh: MeshConfig | None = None,
  rules: Rules | None = None,
) -> Pretrained:
  """Loads a trained model: one of our runs, or one that was published.

  A published folder holds `config.json`, `*.safetensors` and `tokenizer.json`, as on the hub of
  Hugging Face or as transformers writes them. Its weights go to the devices one after the other.

  Args:
    path: a run's workdir, or its folder of checkpoints; a published folder; or the name of a
      repository such as 'deepseek-ai/DeepSeek-V2-Lite', which is downloaded.
    step: which checkpoint of a run; None is the newest that is whole.
    weights: 'averaged' or 'raw' of a run; None is the averaged ones where it keeps any.
    dtype: 'float32' or 'bfloat16', of the matrices and of what is computed; None takes that of the
      run, or that in which a model was published.
    overrides: parts of the model that are to be others, as for `Pretrained.replace`.
    mesh: of all devices; None is one device.
    rules: which array axes lie on which axes of the mesh; None takes those of the run, or FSDP.

  Raises:
    ConfigError: there is no such model, it is damaged or cannot be read, or its weights do not fit
      what its config describes.
  """
  folder = pathlib.Path(path).expanduser().absolute()
  if dtype not in (None, *PRECISIONS):
    raise ConfigError(f'dtype: found {dtype!r}, expected one of {", ".join(PRECISIONS)}, or None')
  if rules is not None and mesh is None:
    raise ConfigError('rules: there is no mesh that they could be of; expected `mesh` too')
  changes = {'mesh': mesh, 'rules': rules, 'precision': PRECISIONS.get(dtype or '')}
  changes = {name: value for name, value in changes.items() if value is not None}
  if (folder / 'checkpoints').is_dir() or saved_steps(folder):
    model = _of_run(folder, step, weights, changes)
  else:
    for name, value in (('step', step), ('weights', weights)):
      if value is not None:
        raise ConfigError(f'{name}: found {value!r}, and {folder} is no run')
    model = _published(_find(str(path), folder), changes)
  return model.replace(**overrides) if overrides else model


def _of_run(
  folder: pathlib.Path, step: int | None, weights: Weights | None, changes: Mapping[str, Any]
) -> Pretrained:
  if (folder / 'checkpoints').is_dir():
    folder /= 'checkpoints'
  step = whole_step(folder, step)
  params, buffers, config = read_params(folder / str(step), weights)
  experiment = from_json(config)
  if not isinstance(experiment, Experiment):
    raise ConfigError(
      f'{folder / str(step)}: its config is no Experiment but {type(experiment).__name__}'
    )
  variables = {'params': params, 'buffers': buffers}
  saved = decoder_of(experiment)
  _require_equal(folder / str(step), variables, shapes_of(saved))
  experiment = dataclasses.replace(experiment, **changes)
  apart = _apart()
  decoder = decoder_of(experiment, apart)
  # Of arrays in the host's memory these are views.
  variables = regrouped(variables, segments_of(saved), segments_of(decoder))
  if not changes:
    variables = jax.tree.map(jnp.asarray, variables)
  else:
    stored = params['embedding']['weight'].dtype.name
    dtype = experiment.precision.compute if 'precision' in changes else stored
    variables = jax.tree.map(
      lambda x, leaf: jax.device_put(np.asarray(x, leaf.dtype), leaf.sharding),
      variables,
      places_of(decoder, dtype, experiment if 'mesh' in changes else None),
    )
  return Pretrained(experiment=experiment, variables=variables, step=step, apart=apart)


def _require_equal(path: pathlib.Path, found: Variables, wanted: Variables) -> None:
  """Compares shapes and dtypes, but that matrices may have been saved in a shorter format."""
  stored = flatten(found)

  def leaf(address: str, like: Any) -> Any:
    dtype = np.dtype(getattr(stored.get(address), 'dtype', like.dtype))
    same = jnp.issubdtype(dtype, jnp.floating) and jnp.issubdtype(like.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(like.shape, dtype if same else like.dtype)

  tree = unflatten({address: leaf(address, like) for address, like in flatten(wanted).items()})
  require_equal_trees(path, found, {name: tree.get(name, {}) for name in wanted})


def _published(folder: pathlib.Path, changes: Mapping[str, Any]) -> Pretrained:
  config = read_json(folder / 'config.json')
  full = config.get('dtype', config.get('torch_dtype')) == 'float32'
  model = model_of(config)
  tensors = open_published(folder, config)
  length = min(config.get('max_position_embeddings') or ROW, ROW)
  experiment = Experiment(
    name=folder.name,
    model=model,
    data=TextCorpus(tokenizer=tokenizer_of(folder, config), length=length, batch_size=8),
    # Small steps: the weights are good already.
    optimizer=AdamW(peak_lr=1e-4),
    schedule=WarmupStableDecay(warmup_steps=10),
    train_steps=1000,
    precision=PRECISIONS['float32' if full else 'bfloat16'],
  )
  experiment = dataclasses.replace(experiment, **changes)
  apart = _apart()

  def planned() -> tuple[Variables, tuple[Segment, ...]]:
    decoder = decoder_of(experiment, apart)
    laid_out = experiment if 'mesh' in changes else None
    return places_of(decoder, experiment.precision.compute, laid_out), segments_of(decoder)

  places, segments = planned()
  loading = prepare(model, tensors, addresses(places, segments))
  if loading.manifest.without_mtp:
    experiment = dataclasses.replace(experiment, model=loading.model)
    places, segments = planned()
  progress = Progress(f'reading {folder.name}', 'MB')

  def tell(done: int) -> None:
    progress.update(done // 1_000_000)

  variables = load(loading.parts, places, segments, tell)
  progress.finish(loading.manifest.bytes // 1_000_000)
  return Pretrained(
    experiment=experiment,
    variables=variables,
    apart=apart,
    template=template_of(folder),
    manifest=loading.manifest,
  )


def places_of(decoder: Decoder, dtype: str, laid_out: Experiment | None = None) -> Variables:
  """Returns shape, dtype and sharding of every array of a model, none of which is made.

  Args:
    decoder: the model.
    dtype: of the matrices; vectors, buffers, routers and mixes of lanes are float32 (or int32).
    laid_out: says mesh and rules, over all devices; None puts all on the first one.

  Raises:
    ConfigError: the mesh does not fit the devices, or does not divide an array.
  """
  segments = segments_of(decoder)
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  shapes = nn.meta.unbox(boxed)
  shardings: dict[str, Any] = {}
  if laid_out is not None:
    mesh = make_mesh(laid_out.mesh)
    specs = tree_specs(laid_out.rules, logical_axes(boxed))
    errors = check_divisible(shapes, specs, {str(axis): n for axis, n in mesh.shape.items()})
    if errors:
      raise ConfigError(errors)
    shardings = flatten(tree_shardings(mesh, specs))
  first = SingleDeviceSharding(jax.local_devices()[0])
  placed, flat = {}, flatten(shapes)
  for address, leaf in addresses(shapes, segments).items():
    home, _ = locate(address, segments)
    # A vector of every layer of a scan is still one of vectors.
    short = len(leaf.shape) > 1 and not EXACT.search(address)
    kind = jnp.dtype(dtype) if short else leaf.dtype
    sharding = shardings.get(home, first)
    placed[home] = jax.ShapeDtypeStruct(flat[home].shape, kind, sharding=sharding)
  tree = unflatten(placed)
  return {name: tree.get(name, {}) for name in shapes}


def _apart() -> Unrolled | None:
  """Each layer by itself on a CPU, where scans take most of the time of a token."""
  return Unrolled() if jax.default_backend() == 'cpu' else None


def _find(path: str, folder: pathlib.Path) -> pathlib.Path:
  """Returns a folder with a published model, which is downloaded if `path` is a repository."""
  if folder.is_dir():
    if (folder / 'config.json').is_file() and 'model_type' in read_json(folder / 'config.json'):
      return folder
    raise ConfigError(
      f"{folder}: holds no checkpoint; expected a run's workdir or its folder of checkpoints, or a "
      'published model with its config.json'
    )
  if not REPOSITORY.fullmatch(path):
    raise ConfigError(f'{folder}: there is no such folder')
  import huggingface_hub  # slow to import, and seldom needed
  from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

  say(f'{path}: no folder here; downloading it from the hub of Hugging Face')
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(path, allow_patterns=FILES))
  except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ConfigError(
      f'{path}: is no folder here, and the repository cannot be downloaded: {reason}'
    ) from error
