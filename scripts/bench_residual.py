"""Times training steps whose residual is hyper-connections against the plain residual.

  python scripts/bench_residual.py                          # whole steps of configs/bench_107m.py
  python scripts/bench_residual.py --dtype=bfloat16 --lanes=2,4

The model is that of configs/bench_107m.py, width 512, with as many layers as `--depth` says. The
residuals take turns, round by round; the ratio is the median over the rounds, its quarters beside
it. Memory is what the compiler reserves beside arguments and results. Run it on a machine that does
nothing else.
"""

import dataclasses
import functools
import statistics
import time
from typing import Any

from absl import app, flags

ROUNDS = flags.DEFINE_integer('rounds', 9, 'rounds that count', lower_bound=1)
DEPTH = flags.DEFINE_integer('depth', 3, 'layers, of which the first is dense', lower_bound=2)
ROWS = flags.DEFINE_integer('rows', 2, 'rows of a batch', lower_bound=1)
LENGTH = flags.DEFINE_integer('length', 512, 'tokens of a row', lower_bound=1)
LANES = flags.DEFINE_list('lanes', ['4'], 'lanes of each hyper-connection')
DTYPE = flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'compute dtype')


def ready(residual: Any) -> tuple[Any, Any, Any, int]:
  """Returns a compiled step, a state, a batch of random tokens [B, T], and bytes of temporaries."""
  import jax
  import numpy as np

  from configs import bench_107m
  from deepseek_jax.core.precision import BFloat16, Float32
  from deepseek_jax.data.batch import Batch
  from deepseek_jax.models.deepseek_v3 import DeepSeekV3
  from deepseek_jax.train.step import build_program

  base = bench_107m.get_config()
  assert isinstance(base.model, DeepSeekV3)
  program = build_program(
    dataclasses.replace(
      base,
      model=dataclasses.replace(base.model, depth=DEPTH.value, residual=residual),
      data=dataclasses.replace(base.data, length=LENGTH.value, batch_size=ROWS.value),
      precision=Float32() if DTYPE.value == 'float32' else BFloat16(),
    )
  )
  shape = (ROWS.value, LENGTH.value)
  tokens = np.random.default_rng(0).integers(3, base.model.vocab, shape).astype(np.int32)
  positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
  ones = np.ones(shape, np.int32)
  arrays = (tokens, tokens, ones.astype(np.float32), positions, ones, ones)
  batch = Batch(*jax.tree.map(jax.numpy.asarray, arrays))
  lowered = program.step.lower(program.abstract_state, program.abstract_batch())
  compiled = lowered.compile()
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  step = functools.partial(_run, compiled, program.step.constants)
  state = program.init(jax.random.key(0))
  return step, state, jax.device_put(batch, program.batch_sharding), temporaries


def _run(compiled: Any, constants: tuple[Any, ...], state: Any, batch: Any) -> Any:
  return compiled(state, batch, *constants)


def main(argv: list[str]) -> None:
  """Measures."""
  del argv
  import jax

  from deepseek_jax.layers.hyper_connections import HyperConnections
  from deepseek_jax.layers.residual import Add

  residuals = {'Add': Add()} | {
    f'HyperConnections(lanes={n})': HyperConnections(lanes=int(n)) for n in LANES.value
  }
  made = {name: ready(residual) for name, residual in residuals.items()}
  states = {name: state for name, (_, state, _, _) in made.items()}
  spent: dict[str, list[float]] = {name: [] for name in made}
  for _ in range(ROUNDS.value + 1):
    for name, (step, _, batch, _) in made.items():
      begin = time.perf_counter()
      states[name], _ = jax.block_until_ready(step(states[name], batch))
      # The first round warms up.
      spent[name].append(time.perf_counter() - begin)
  plain = spent['Add'][1:]
  for name, seconds in spent.items():
    ratios = sorted(mine / base for mine, base in zip(seconds[1:], plain, strict=True))
    quarter = len(ratios) // 4
    temporaries = made[name][3] / 1e6
    print(
      f'{name:<28} {1e3 * statistics.median(seconds[1:]):9.1f} ms'
      f'   ratio {statistics.median(ratios):.3f}'
      f' ({ratios[quarter]:.3f}–{ratios[-1 - quarter]:.3f})   temporaries {temporaries:,.0f} MB'
    )


if __name__ == '__main__':
  app.run(main)
