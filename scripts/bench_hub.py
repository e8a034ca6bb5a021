"""Times published folders: prompts and tokens a second beside transformers, and memory of loading.

  python scripts/bench_hub.py --torch=PYTHON_WITH_TORCH             # 107 M parameters as V3
  python scripts/bench_hub.py --torch=PYTHON_WITH_TORCH --family=v4
  python scripts/bench_hub.py --beside=scans                        # layers apart against in scans
  python scripts/bench_hub.py --beside=single --batches=1           # a row with and without padding
  python scripts/bench_hub.py --what=load --layers=4               # shapes of V2-Lite

Speed: a model with random weights is exported once; both sides read that folder, and take turns
round by round; medians count. `--torch` names an interpreter with torch and transformers, see
bench_hub_torch.py; without it only this project is timed. Loading: a folder with V2-Lite's shapes
is written, and read in a process of its own, whose memory is watched: files that are mapped into
memory do not count, for they are the system's to drop. Run it on a machine that does nothing else.
"""

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from absl import app, flags

WHAT = flags.DEFINE_enum('what', 'speed', ['speed', 'load', 'load_one'], 'what is measured')
FAMILY = flags.DEFINE_enum('family', 'v3', ['v3', 'v4'], 'of the model that is timed')
TORCH = flags.DEFINE_string('torch', None, 'an interpreter that has torch and transformers')
BESIDE = flags.DEFINE_enum(
  'beside', 'torch', ['torch', 'scans', 'single'], 'what it is timed beside'
)
EXPERTS = flags.DEFINE_enum('experts', 'grouped_mm', ['grouped_mm', 'eager'], "the peer's experts")
DTYPES = flags.DEFINE_list('dtypes', ['float32', 'bfloat16'], 'of weights and activations')
BATCHES = flags.DEFINE_list('batches', ['1', '8', '32'], 'prompts side by side')
CONTEXTS = flags.DEFINE_list('contexts', ['128', '2048'], 'tokens of a prompt')
STEPS = flags.DEFINE_integer('steps', 16, 'tokens that are added', lower_bound=2)
ROUNDS = flags.DEFINE_integer('rounds', 3, 'rounds that count', lower_bound=1)
LAYERS = flags.DEFINE_integer('layers', 4, 'layers of the folder that is loaded', lower_bound=2)
FOLDER = flags.DEFINE_string('folder', None, 'where folders are written; a temporary one if None')


def model_of_family() -> Any:
  """Returns the experiment whose weights are timed."""
  from configs import bench_107m
  from deepseek_jax.core.override import override

  experiment = bench_107m.get_config()
  if FAMILY.value == 'v3':
    return experiment
  from deepseek_jax.layers.attention.csa import CSA
  from deepseek_jax.layers.attention.hca import HCA
  from deepseek_jax.layers.attention.shared_window import SharedWindow
  from deepseek_jax.layers.moe.moe import MoE
  from deepseek_jax.layers.moe.router.sqrt_softplus import SqrtSoftplus
  from deepseek_jax.models.deepseek_v4 import DeepSeekV4

  sizes: dict[str, Any] = {
    'heads': 8,
    'head_dim': 128,
    'rope_dim': 32,
    'query_latent': 192,
    'groups': 2,
    'group_dim': 192,
    'window': 128,
  }
  v4 = DeepSeekV4(
    depth=8,
    width=512,
    vocab=8192,
    first=SharedWindow(**sizes),
    sparse=CSA(**sizes, ratio=4, top_k=128, index_heads=8, index_dim=32),
    heavy=HCA(**sizes, ratio=128),
    feed_forward=MoE(experts=32, top_k=4, hidden=256, limit=10.0, router=SqrtSoftplus(scale=1.5)),
  )
  return override(experiment, {'name': 'bench_v4', 'model': v4})[0]


def export(folder: pathlib.Path) -> None:
  """Writes the model with random weights."""
  import jax
  from flax import linen as nn

  from deepseek_jax.core.override import override
  from deepseek_jax.core.precision import Float32
  from deepseek_jax.hub import Pretrained
  from deepseek_jax.models.decoder import init_variables

  experiment = override(model_of_family(), {'precision': Float32()})[0]
  decoder = experiment.model.build()
  variables = nn.meta.unbox(jax.jit(lambda key: init_variables(decoder, key))(jax.random.key(0)))
  list(Pretrained(experiment=experiment, variables=variables).export(folder))


class Peer:
  """Transformers in a process of its own."""

  def __init__(self, folder: pathlib.Path, dtype: str):
    """Loads the folder."""
    script = pathlib.Path(__file__).with_name('bench_hub_torch.py')
    threads = str(len(os.sched_getaffinity(0)))
    # Variables that are meant for this interpreter would mislead the other one.
    environ = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
    self.process = subprocess.Popen(
      [str(TORCH.value), str(script), str(folder), dtype, EXPERTS.value, threads],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=environ,
      text=True,
    )
    self._read()

  def _read(self) -> dict[str, float]:
    assert self.process.stdout is not None
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f'{TORCH.value}: ended; see its message above')
    return json.loads(line)

  def __call__(self, case: dict[str, int]) -> dict[str, float]:
    """Returns the seconds of a case."""
    assert self.process.stdin is not None
    self.process.stdin.write(json.dumps(case) + '\n')
    self.process.stdin.flush()
    return self._read()

  def close(self) -> None:
    """Ends the process."""
    self.process.kill()
    self.process.wait()


def ours(model: Any, case: dict[str, int], single: bool = False) -> dict[str, float]:
  """Returns the seconds of a case: the prompts, and a step of all rows.

  Args:
    model: what is timed.
    case: `batch`, `context` and `steps`.
    single: whether a row is fed a token alone, also where padding beside it is faster.
  """
  import jax
  import numpy as np

  from deepseek_jax.infer.decode import PlacedModel, jit_decode_step, jit_prefill
  from deepseek_jax.infer.prompt import bucket
  from deepseek_jax.infer.sample import Greedy

  batch, context, steps = case['batch'], case['context'], case['steps']
  tokens = np.random.default_rng(0).integers(0, model.model.vocab, (batch, context), np.int32)
  placed = PlacedModel(model.decoder, model.variables)
  step = jit_single_step() if single else jit_decode_step
  lengths = np.full(batch, context, np.int32)
  caches = jax.block_until_ready(placed.caches(batch, bucket(context + steps + 1)))
  start = time.perf_counter()
  logits, caches = placed.call(jit_prefill, caches, tokens, np.zeros_like(lengths), lengths)
  chosen = jax.block_until_ready(placed.choose(Greedy(), logits, 0, 0))
  prefill = time.perf_counter() - start
  times = []
  for index in range(steps):
    start = time.perf_counter()
    logits, caches = placed.call(step, caches, chosen, lengths + np.int32(index))
    chosen = jax.block_until_ready(placed.choose(Greedy(), logits, 0, index + 1))
    times.append(time.perf_counter() - start)
  return {'prefill': prefill, 'decode': statistics.median(times)}


@functools.cache
def jit_single_step() -> Any:
  """Returns a decoding step that feeds one token a row and nothing else."""
  import jax
  import jax.numpy as jnp

  from deepseek_jax.infer.decode import prefill

  def step(decoder: Any, variables: Any, caches: Any, tokens: Any, positions: Any) -> Any:
    ones = jnp.ones_like(positions)
    return prefill(decoder, variables, caches, tokens[:, None], positions, ones)

  return jax.jit(step, static_argnums=0, donate_argnums=2)


def in_scans(model: Any) -> Any:
  """Returns the model with its layers grouped as in training."""
  from deepseek_jax.hub.pretrained import regrouped, run_segments, segments_of

  own, scans = segments_of(model.decoder), run_segments(model.experiment)
  variables = regrouped(model.variables, own, scans)
  return dataclasses.replace(model, variables=variables, apart=None)


def speed(folder: pathlib.Path) -> None:
  """Prints tokens a second of every case, by turns with the peer."""
  from deepseek_jax.hub import from_pretrained

  if not (folder / 'SHA256SUMS').is_file():
    export(folder)
  cases = [
    {'batch': int(batch), 'context': int(context), 'steps': STEPS.value}
    for context in CONTEXTS.value
    for batch in BATCHES.value
  ]
  for dtype in DTYPES.value:
    model = from_pretrained(folder, dtype=dtype)
    sides: dict[str, Any] = {'ours': functools.partial(ours, model)}
    peer = Peer(folder, dtype) if TORCH.value and BESIDE.value == 'torch' else None
    if peer:
      sides['peer'] = peer
    elif BESIDE.value == 'scans':
      sides['peer'] = functools.partial(ours, in_scans(model))
    elif BESIDE.value == 'single':
      sides['peer'] = functools.partial(ours, model, single=True)
    for case in cases:
      found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
      for round_ in range(ROUNDS.value + 1):
        for name, side in sides.items():
          seconds = side(case)
          if round_:  # the first compiles
            found[name].append(seconds)
      print(line_of(dtype, case, found), flush=True)
    if peer:
      peer.close()


def line_of(dtype: str, case: dict[str, int], found: dict[str, list[dict[str, float]]]) -> str:
  """Returns a line of the table: tokens a second, and their ratio in each round."""
  cells = [f'{dtype:9} batch {case["batch"]:3} context {case["context"]:5}']
  for part, tokens in (('prefill', case['batch'] * case['context']), ('decode', case['batch'])):
    rates = {name: [tokens / t[part] for t in times] for name, times in found.items()}
    text = f'{part} {statistics.median(rates["ours"]):8.1f}'
    if 'peer' in rates:
      ratios = [mine / other for mine, other in zip(rates['ours'], rates['peer'], strict=True)]
      text += (
        f' by {statistics.median(rates["peer"]):8.1f} = {statistics.median(ratios):5.2f} '
        f'({min(ratios):.2f}–{max(ratios):.2f})'
      )
    cells.append(text)
  return ' | '.join(cells)


def write_v2_lite(folder: pathlib.Path) -> None:
  """Writes a folder with V2-Lite's shapes and some of its layers; every tensor is random bytes."""
  import ml_dtypes
  import numpy as np

  from configs import v2_lite
  from deepseek_jax.convert.config_json import config_of
  from deepseek_jax.convert.lazy import Lazy
  from deepseek_jax.convert.load import addresses
  from deepseek_jax.convert.names import names_of
  from deepseek_jax.convert.safetensors import write_folder
  from deepseek_jax.core.override import override
  from deepseek_jax.hub.pretrained import shapes_of
  from deepseek_jax.models.decoder import plan_segments
  from deepseek_jax.models.deepseek_v3 import DeepSeekV3

  model = override(v2_lite.get_config(), {'model.depth': LAYERS.value})[0].model
  assert isinstance(model, DeepSeekV3)
  shapes = addresses(shapes_of(model.build()), plan_segments(model))
  rng = np.random.default_rng(0)

  def random(shape: tuple[int, ...]) -> Lazy:
    def read(index: tuple[slice, ...]) -> np.ndarray:
      size = tuple(part.stop - part.start for part in index)
      # Exponents below 1: no number is infinite.
      bits = rng.integers(0, 0x3F80, size, np.uint16)
      return bits.view(ml_dtypes.bfloat16)

    return Lazy(shape, np.dtype(ml_dtypes.bfloat16), read)

  tensors: dict[str, Lazy] = {}
  for entry in names_of(model).entries:
    leaf = shapes[entry.ours]
    like = Lazy(leaf.shape, np.dtype(leaf.dtype), lambda index: np.empty(0))
    parts = entry.form.theirs(like)
    tensors |= {name: random(part.shape) for name, part in zip(entry.theirs, parts, strict=True)}
  list(write_folder(folder, tensors))
  config = config_of(model, 4096) | {'dtype': 'bfloat16'}
  (folder / 'config.json').write_text(json.dumps(config), encoding='utf-8')


def anonymous() -> int:
  """Returns the bytes of this process that are not of files."""
  for line in pathlib.Path('/proc/self/status').read_text(encoding='utf-8').splitlines():
    if line.startswith('RssAnon:'):
      return int(line.split()[1]) * 1024
  raise SystemExit('/proc/self/status does not say RssAnon: only Linux can measure this')


def load_one(folder: pathlib.Path) -> None:
  """Loads a folder and prints what it took."""
  import jax

  from deepseek_jax.hub import from_pretrained

  before = anonymous()
  peak, done = [before], threading.Event()

  def watch() -> None:
    while not done.wait(0.02):
      peak[0] = max(peak[0], anonymous())

  watcher = threading.Thread(target=watch)
  watcher.start()
  start = time.perf_counter()
  model = from_pretrained(folder, dtype=DTYPES.value[0])
  seconds = time.perf_counter() - start
  done.set()
  watcher.join()
  held = sum(x.nbytes for x in jax.tree.leaves(model.variables))
  extra = max(peak[0], anonymous()) - before - held
  group = max(x.nbytes for x in jax.tree.leaves(model.variables)) / (LAYERS.value - 1)
  print(
    f'{DTYPES.value[0]:9} arrays {held / 1e9:.2f} GB, beyond them at most {extra / 1e9:.2f} GB; '
    f'the largest array of a layer has {group / 1e9:.2f} GB; {held / 1e9 / seconds:.2f} GB/s'
  )


def main(arguments: list[str]) -> None:
  """Runs what is asked for."""
  del arguments
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(FOLDER.value or scratch) / WHAT.value.removesuffix('_one') / FAMILY.value
    if WHAT.value == 'speed':
      speed(folder)
    elif WHAT.value == 'load_one':
      load_one(folder)
    else:
      if not (folder / 'config.json').is_file():
        write_v2_lite(folder)
      for dtype in DTYPES.value:
        command = [sys.executable, '-m', 'scripts.bench_hub', '--what=load_one']
        given = [f'--folder={FOLDER.value or scratch}', f'--layers={LAYERS.value}']
        subprocess.run([*command, *given, f'--dtypes={dtype}'], check=True)


if __name__ == '__main__':
  app.run(main)
