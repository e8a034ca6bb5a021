"""Devices of a slice that is not here, and compiling for them with libtpu from PyPI."""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from deepseek_jax.core.config import ConfigError
from deepseek_jax.pods.chips import Chip, find_chip

_FORM = re.compile(r'([a-z0-9]+):(\d+(?:x\d+)*)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
  """A slice of chips.

  Attributes:
    generation: a name of `chips.CHIPS`.
    shape: chips along each axis of the torus.
    measured: what one device can do, of a generation that is in no table.
  """

  generation: str
  shape: tuple[int, ...]
  measured: Chip | None = None

  @property
  def chip(self) -> Chip:
    """What one device can do."""
    return self.measured or find_chip(self.generation)

  @property
  def chips(self) -> int:
    """Number of chips."""
    return math.prod(self.shape)

  @property
  def devices(self) -> int:
    """Devices, as JAX counts them."""
    return self.chips * self.chip.devices_per_chip

  @property
  def name(self) -> str:
    """As it is written on a command line."""
    return f'{self.generation}:{"x".join(map(str, self.shape))}'


def parse_topology(text: str) -> Topology:
  """Reads 'v5p:8x8x8', 512 chips of one slice: a mesh over several is not laid out yet.

  Raises:
    ConfigError: it is no topology of a known generation.
  """
  match = _FORM.fullmatch(text)
  if match is None:
    raise ConfigError(f'--topology {text!r}: expected one slice like v5p:8x8x8 or v6e:8x8')
  generation, shape = match[1], tuple(map(int, match[2].split('x')))
  chip = find_chip(generation)
  if len(shape) == 2 and chip.ici_axes == 3:
    shape = (*shape, 1)
  if len(shape) != chip.ici_axes or min(shape) < 1:
    raise ConfigError(
      f'--topology {text!r}: chips of {generation} lie along {chip.ici_axes} axes, such as '
      f'{generation}:{"x".join(["4"] * chip.ici_axes)}'
    )
  return Topology(generation=generation, shape=shape)


@dataclasses.dataclass(frozen=True)
class Place:
  """Stands for a device where only its place matters; nothing can be compiled for it.

  Attributes:
    id: its number.
    coords: its chip's place in the torus.
    core_on_chip: which device of the chip it is.
    device_kind: as JAX calls it.
    platform: as JAX calls it.
  """

  id: int
  coords: tuple[int, ...]
  core_on_chip: int
  device_kind: str
  platform: str = 'tpu'
  process_index: int = 0


def places(topology: Topology) -> list[Place]:
  """Returns stand-ins for the devices of a slice, for estimates without a compiler."""
  shape = (*topology.shape, *(1,) * (3 - len(topology.shape)))
  chips = [c[::-1] for c in itertools.product(*(range(size) for size in reversed(shape)))]
  dies = range(topology.chip.devices_per_chip)
  each = [(coords, die) for coords in chips for die in dies]
  kind = topology.chip.device_kind
  return [Place(number, coords, die, kind) for number, (coords, die) in enumerate(each)]


def prepare(environ: MutableMapping[str, str]) -> None:
  """Sets what keeps libtpu from looking for a TPU; call it before JAX starts.

  Raises:
    ConfigError: libtpu is not installed.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError(
      'the compiler for TPUs is not installed; to install it: pip install "deepseek_jax[pods]"'
    )
  environ.update(
    TPU_SKIP_MDS_QUERY='1',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    JAX_PLATFORMS='cpu',
    TPU_WORKER_HOSTNAMES=environ.get('TPU_WORKER_HOSTNAMES', 'localhost'),
    TPU_STDERR_LOG_LEVEL='3',
    TPU_MIN_LOG_LEVEL='3',
  )


def find_devices(topology: Topology) -> list[Any]:
  """Returns devices to compile for; nothing can run on them.

  Raises:
    ConfigError: the compiler knows no such slice.
  """
  from jax.experimental import topologies

  shape = 'x'.join(map(str, topology.shape))
  try:
    found = topologies.get_topology_desc(f'{topology.generation}:{shape}', 'tpu')
  except Exception as error:
    raise ConfigError(f'--topology {topology.name}: the compiler says: {error}') from error
  devices = list(found.devices)
  if len(devices) != topology.devices:
    raise ConfigError(
      f'--topology {topology.name}: expected {topology.devices} devices, the compiler has '
      f'{len(devices)}'
    )
  return devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Build:
  """What a compiler made of a program.

  Attributes:
    text: the optimised HLO, in the order in which it runs.
    live_ranges: what lies in memory when most does, as the compiler says it; '' where it does not.
    peak_bytes: memory of a device at that time, arguments and results included.
    cost: the compiler's own figures: loop bodies once, kernels not at all.
    lower_seconds: time until the compiler was called.
    compile_seconds: time that the compiler took.
  """

  text: str
  live_ranges: str
  peak_bytes: int
  cost: dict[str, float]
  lower_seconds: float
  compile_seconds: float


def compile_program(lower: Callable[[], Any], for_tpu: bool = False) -> Build:
  """Compiles a program, also one that is too large for its device.

  Args:
    lower: traces it and returns what `jax.jit(...).lower(...)` returns.
    for_tpu: whether its devices are TPUs; the compilers for others do not know their options.
  """
  start = time.perf_counter()
  lowered = lower()
  lowered_at = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    options: dict[str, Any] = {'xla_dump_to': folder, 'xla_dump_hlo_as_text': True}
    if for_tpu:
      # What does not fit is compiled too, to say by how much and why.
      options['xla_tpu_no_crash_on_oom'] = True
    compiled = lowered.compile(options)
    done = time.perf_counter()
    ranges = sorted(pathlib.Path(folder).glob('*live-range.txt'), key=lambda p: p.stat().st_size)
    live_ranges = ranges[-1].read_text() if ranges else ''
  cost: dict[str, float] = {}
  with contextlib.suppress(Exception):
    cost = {k: v for k, v in compiled.cost_analysis().items() if '{' not in k}
  return Build(
    text=compiled.as_text(),
    live_ranges=live_ranges,
    peak_bytes=int(compiled.memory_analysis().peak_memory_in_bytes),
    cost=cost,
    lower_seconds=lowered_at - start,
    compile_seconds=done - lowered_at,
  )
