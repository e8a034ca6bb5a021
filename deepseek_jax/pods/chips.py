"""What an accelerator can do: the one table, with a source beside each number.

Everything is of one *device*, as JAX counts them: a whole chip, but half of a TPU7x, whose two
dies are two devices.
"""

import dataclasses
import difflib
from collections.abc import Mapping

from deepseek_jax.core.config import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One device of a generation.

  Attributes:
    name: as topologies are called, such as 'v5p'.
    device_kind: as JAX calls it.
    devices_per_chip: devices of JAX in one chip.
    matrix_flops: peak FLOP/s of matrix products by dtype of the operands.
    vector_flops: FLOP/s of everything else, float32.
    clock_hz: cycles a second, for the compiler's own estimates.
    hbm_bytes: memory that a program can use; the rest is the runtime's.
    hbm_bandwidth: bytes a second between memory and the core.
    ici_axes: axes of the torus that chips are wired in.
    ici_link: bytes a second that one link carries one way; an axis has a link each way.
    hop_seconds: until the first byte of an exchange is one chip further.
    dcn_bandwidth: bytes a second to other slices, through the host.
    vmem_bytes: memory beside the core that the compiler manages.
    ring: shortest axis of a slice that is closed to a ring, in chips.
  """

  name: str
  device_kind: str
  devices_per_chip: int = 1
  matrix_flops: Mapping[str, float]
  vector_flops: float
  clock_hz: float
  hbm_bytes: float
  hbm_bandwidth: float
  ici_axes: int
  ici_link: float
  hop_seconds: float = 1e-6
  dcn_bandwidth: float
  vmem_bytes: float
  ring: int

  def rate(self, dtype: str) -> float:
    """Returns the peak FLOP/s of matrix products of operands of a dtype, as HLO names it."""
    return self.matrix_flops.get(dtype, self.matrix_flops['bf16'])


# Sources. [T] docs.cloud.google.com/tpu/docs/tpu7x, the table of v5p, v6e and TPU7x; [E]
# docs.cloud.google.com/tpu/docs/v6e, the table of v5e and v6e; [J] jax 0.12, jax/_src/tpu_info.py;
# [L] libtpu 0.0.52, "available HBM" in what the compiler says of a program that is too large.
# - matrix_flops: bf16 [T] [E]; int8 [E], v5p's as in [J]; fp8 [T]: where it has no rate of its own
#   it has that of bf16. float32 operands are multiplied as bf16 by default, so at that rate.
# - vector_flops: [J] has none; 8 × 128 × 4 operations a cycle and core, at the clock
#   that the matrix rate implies (2 × 128 × 128 × units a cycle). It only matters where nothing else
#   does: such operations are bound by memory nearly always.
# - clock_hz: bf16 FLOP/s over those of a cycle: 2 × 128² a unit and 4 units a core in v5e and v5p,
#   2 × 256² and 2 units in v6e; TPU7x's is that of v6e's units at its rate.
# - ici_link: the bidirectional bandwidth of a chip [T] [E] over its links and both ways. v5p 1200
#   GB/s: 6 links, 100 GB/s one way; v6e 800: 4 links, 100; TPU7x 1200: 6 links, 100, of which each
#   of its two devices has half; v5e 1600 Gbit/s one way: 4 links, 50.
# - hop_seconds: about a microsecond, the scaling book of JAX, "Sharded matrices".
# - dcn_bandwidth: [T] 50, 100, 100 Gbit/s a chip; [E] v5e 6.4 Tbit/s a pod of 256 chips.
# - vmem_bytes: [J]. hbm_bytes: [L] 15.75, 95.73, 31.24 and 94.74 GiB a device.
# - ring: [E] and docs.cloud.google.com/tpu/docs/v5p: axes of 16 (v5e, v6e), multiples of 4 (3-D).
CHIPS: dict[str, Chip] = {
  chip.name: chip
  for chip in (
    Chip(
      name='v5e',
      device_kind='TPU v5 lite',
      matrix_flops={'bf16': 197e12, 'f32': 197e12, 's8': 393e12, 'u8': 393e12},
      vector_flops=6.1e12,
      clock_hz=1.50e9,
      hbm_bytes=15.75 * GIB,
      hbm_bandwidth=819e9,
      ici_axes=2,
      ici_link=50e9,
      dcn_bandwidth=3.125e9,
      vmem_bytes=128 * 2**20,
      ring=16,
    ),
    Chip(
      name='v5p',
      device_kind='TPU v5',
      matrix_flops={'bf16': 459e12, 'f32': 459e12, 's8': 918e12, 'u8': 918e12},
      vector_flops=14.3e12,
      clock_hz=1.75e9,
      hbm_bytes=95.73 * GIB,
      hbm_bandwidth=2765e9,
      ici_axes=3,
      ici_link=100e9,
      dcn_bandwidth=6.25e9,
      vmem_bytes=128 * 2**20,
      ring=4,
    ),
    Chip(
      name='v6e',
      device_kind='TPU v6 lite',
      matrix_flops={'bf16': 918e12, 'f32': 918e12, 's8': 1836e12, 'u8': 1836e12},
      vector_flops=7.2e12,
      clock_hz=1.75e9,
      hbm_bytes=31.24 * GIB,
      hbm_bandwidth=1638e9,
      ici_axes=2,
      ici_link=100e9,
      dcn_bandwidth=12.5e9,
      vmem_bytes=128 * 2**20,
      ring=16,
    ),
    Chip(
      name='tpu7x',
      device_kind='TPU7x',
      devices_per_chip=2,
      matrix_flops={
        'bf16': 2307e12 / 2,
        'f32': 2307e12 / 2,
        'f8e4m3fn': 4614e12 / 2,
        'f8e5m2': 4614e12 / 2,
      },
      vector_flops=9.0e12,
      clock_hz=2.2e9,
      hbm_bytes=94.74 * GIB,
      hbm_bandwidth=7380e9 / 2,
      ici_axes=3,
      ici_link=100e9 / 2,
      dcn_bandwidth=12.5e9 / 2,
      vmem_bytes=64 * 2**20,
      ring=4,
    ),
  )
}


def find_chip(name: str) -> Chip:
  """Returns the device of a generation.

  Raises:
    ConfigError: the table does not have it.
  """
  if name in CHIPS:
    return CHIPS[name]
  match = difflib.get_close_matches(name, CHIPS, n=1)
  hint = f'; did you mean `{match[0]}`?' if match else ''
  raise ConfigError(f'unknown accelerator `{name}`{hint}; known are {", ".join(CHIPS)}')
