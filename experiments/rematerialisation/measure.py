"""What gradients from 8-bit activations do to training, and how wrong they are.

  python -m experiments.rematerialisation.measure \
      --output=experiments/rematerialisation/results.jsonl

Trains the same model with exact and with compressed rematerialisation from the same seeds on the
same text, and without rematerialisation for the size of differences that float32 rounding alone
makes. After training, gradients of one batch are compared for several block sizes.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from deepseek_jax.models.remat import Compressed, EveryLayer, Remat
from deepseek_jax.train.evaluate import evaluate
from deepseek_jax.train.state import TrainState
from deepseek_jax.train.step import Program, build_program
from experiments.rematerialisation.model import experiment, make_gradients

KINDS: dict[str, Remat | None] = {
  'none': None,
  'every_layer': EveryLayer(),
  'compressed': Compressed(),
}
BLOCKS = (8, 16, 32, 64, 128)
BATCHES = 4
DEPTH, ROWS = 6, 8


def train(program: Program, data: Any, seed: int) -> tuple[TrainState, float]:
  """Returns the state after all steps and the mean loss of the last fifty."""
  state = program.init(jax.random.key(seed))
  batches, losses = data.train_batches(0), []
  for _ in range(program.experiment.train_steps):
    state, metrics = program.step(state, jax.device_put(next(batches), program.batch_sharding))
    losses.append(metrics['loss'])
  return state, float(np.mean(jax.device_get(losses[-50:])))


def compare(got: Any, want: Any) -> tuple[float, float]:
  """Returns the relative error and the cosine of two trees of gradients."""
  a, b = (
    np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)]) for tree in (got, want)
  )
  cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  return float(np.linalg.norm(a - b) / np.linalg.norm(b)), float(cosine)


def main() -> None:
  """Trains, compares, writes."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--steps', type=int, default=400)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--cache_dir', type=pathlib.Path, default='cache')
  parser.add_argument('--output', type=pathlib.Path, required=True)
  options = parser.parse_args()

  programs = {
    name: build_program(experiment(DEPTH, remat, ROWS, steps=options.steps))
    for name, remat in KINDS.items()
  }
  some = programs['every_layer']
  gradients: dict[int | None, Callable[..., Any]] = {None: make_gradients(some, EveryLayer())}
  gradients |= {block: make_gradients(some, Compressed(block=block)) for block in BLOCKS}
  done = set()
  if options.output.exists():
    lines = options.output.read_text(encoding='utf-8').splitlines()
    done = {row['seed'] for row in map(json.loads, lines) if row['what'] == 'gradient'}
  for seed in range(options.seeds):
    if seed in done:
      continue
    rows = []
    for name, program in programs.items():
      chosen = dataclasses.replace(program.experiment.data, shuffle_seed=seed)
      data = chosen.prepare(options.cache_dir)
      state, loss = train(program, data, seed)
      held_out = evaluate(program, state.params, state.buffers, data.heldout, 48)
      row = {'what': 'loss', 'kind': name, 'seed': seed, 'steps': options.steps}
      rows.append({**row, 'train_loss': loss, 'bits_per_byte': held_out.bits_per_byte})
      print(json.dumps(rows[-1]), flush=True)
    batches = data.train_batches(options.steps)
    parts = [jax.device_put(next(batches), program.batch_sharding) for _ in range(BATCHES)]
    # Each batch of its own: a sum over batches would hide what differs in sign.
    found = {
      block: [jax.device_get(function(state.params, state.buffers, part)) for part in parts]
      for block, function in gradients.items()
    }
    for block in BLOCKS:
      errors = [compare(got, want) for got, want in zip(found[block], found[None], strict=True)]
      error, cosine = np.mean(errors, axis=0).tolist()
      rows.append(
        {'what': 'gradient', 'block': block, 'seed': seed, 'error': error, 'cosine': cosine}
      )
    # A seed is written whole or not at all: a killed sweep begins with the first one missing.
    with options.output.open('a', encoding='utf-8') as file:
      file.writelines(json.dumps(row) + '\n' for row in rows)


if __name__ == '__main__':
  main()
