"""Runs of a few steps: as the training loop would do them, and compared as they should be."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from deepseek_jax import lab
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.precision import Fastest
from deepseek_jax.lab.trial import one_device, standard_error


def test_a_trial_is_the_run(trial, cache_dir):
  """The first seed gives the very numbers of the program's own step on the run's own batches."""
  experiment = trial.experiment
  program = one_device(experiment)
  data = experiment.data.prepare(cache_dir)
  state = program.init(jax.random.key(experiment.seed))
  source = data.train_batches(0)
  for number in range(experiment.train_steps):
    state, metrics = program.step(state, jax.device_put(next(source), program.batch_sharding))
    for name in ('loss', 'grad_norm', 'learning_rate'):
      assert trial.curves[name][0, number] == float(metrics[name]), name
  final = {'params': state.params, 'buffers': state.buffers}
  jax.tree.map(np.testing.assert_array_equal, final, trial.model.variables)
  assert trial.model.step == experiment.train_steps


def test_a_trial_is_on_one_device(trial):
  """Of eight; and a cell that is run again compiles nothing."""
  experiment = trial.experiment
  leaf = jax.tree.leaves(trial.model.variables)[0]
  assert len(leaf.sharding.device_set) == 1
  assert one_device(experiment) is one_device(dataclasses.replace(experiment))
  assert one_device(experiment) is not one_device(dataclasses.replace(experiment, train_steps=9))


def test_seeds_differ_in_weights_and_in_text(trial):
  """Equal first losses would mean equal weights and equal text."""
  assert trial.seeds == (0, 1)
  assert trial.curves['loss'].shape == (2, trial.experiment.train_steps)
  assert np.isfinite(trial.curves['loss']).all()
  assert (trial.curves['loss'][0] != trial.curves['loss'][1]).all()
  assert trial.heldout.shape == (2,)
  assert trial.heldout[0] != trial.heldout[1]
  assert trial.step_seconds > 0


def test_loads_count_every_choice(trial):
  """Of every step: each token of the batch K times."""
  data = trial.experiment.data
  (load,) = trial.loads.values()
  assert list(trial.loads) == ['layers/0']
  assert load.shape == (2, trial.experiment.train_steps, 8)
  assert (load.sum(axis=-1) <= 2 * data.batch_size * data.length).all()
  assert (load.sum(axis=-1) > data.batch_size * data.length).all()


def test_the_heldout_batch_is_the_first(experiment, cache_dir):
  """Rows in order."""
  batch, data = lab.heldout(experiment, cache_dir), experiment.data.prepare(cache_dir)
  assert batch.tokens.shape == (experiment.data.batch_size, experiment.data.length)
  np.testing.assert_array_equal(batch.tokens[1], data.heldout.row(1).tokens)


def test_an_untrained_model_is_that_of_the_run(trial):
  """With the run's own seed, or another; `Fastest` is float32, so that nothing is measured."""
  experiment = trial.experiment
  program = one_device(experiment)
  first, other = (program.init(jax.random.key(seed)).params for seed in (experiment.seed, 3))
  model = lab.init(dataclasses.replace(experiment, precision=Fastest()))
  assert model.experiment.precision.compute == 'float32'
  assert model.step == 0
  jax.tree.map(np.testing.assert_array_equal, first, model.variables['params'])
  drawn = lab.init(experiment, seed=3).variables['params']
  jax.tree.map(np.testing.assert_array_equal, other, drawn)
  assert (drawn['head']['weight'] != first['head']['weight']).any()


def test_an_override_says_what_it_changes(experiment, capsys):
  """The difference, and the size before and after; the experiment itself stays as it is."""
  changed = lab.override(experiment, {'model.attention': 'Window(size=3)', 'model.depth': 2})
  said = capsys.readouterr().out
  assert type(changed.model.attention).__name__ == 'Window'
  assert changed.model.attention.latent == experiment.model.attention.latent
  assert experiment.model.depth == 3
  assert 'model.depth: 3 → 2' in said
  assert '(changed)' in said
  lab.override(experiment, {'model.attention': 'Window(size=3)'})
  said = capsys.readouterr().out
  assert 'parameters:' in said
  assert '(changed)' not in said


def test_bad_input_is_told_at_once(experiment):
  """Before anything is compiled or read."""
  with pytest.raises(ConfigError, match=r'seeds: .*\n?.*steps: found 0'):
    lab.train(experiment, steps=0, seeds=0)
  with pytest.raises(ConfigError, match='warmup_steps=2'):
    lab.train(experiment, steps=1)
  with pytest.raises(ConfigError, match='depht'):
    lab.override(experiment, {'model.depht': 3})


def made_of(trial, heldout, seeds):
  """A trial with other figures."""
  return dataclasses.replace(trial, heldout=np.array(heldout), seeds=tuple(seeds))


def test_the_difference_is_paired(trial):
  """Seed by seed: variants that move together are told apart though their seeds differ more."""
  base = made_of(trial, [1.0, 2.0, 3.0], (0, 1, 2))
  other = made_of(trial, [3.1, 1.1, 2.1], (2, 0, 1))
  first, second = lab.compare({'base': base, 'other': other}).splitlines()[2:]
  spread = np.std([1, 2, 3], ddof=1) / math.sqrt(3)
  assert f'2.0000 ± {spread:.4f}' in first
  assert '–' in first
  assert '+0.1000 [+0.1000, +0.1000]  higher' in second


def test_one_seed_has_no_error(trial):
  """And seeds that are not shared cannot be paired."""
  base, one = made_of(trial, [1.0, 2.0], (0, 1)), made_of(trial, [2.5], (1,))
  last = lab.compare({'base': base, 'one': one}).splitlines()[-1]
  assert '2.5000 ± ?' in last
  assert '+0.5000 [?]' in last
  assert 'one seed: cannot be told' in last
  with pytest.raises(ConfigError, match=r"'far' has seeds \(7,\)"):
    lab.compare({'base': base, 'far': made_of(trial, [1.0], (7,))})
  with pytest.raises(ConfigError, match='at least 1 trial'):
    lab.compare({})


def test_the_standard_error_is_that_of_the_mean():
  """Over the first axis."""
  values = np.array([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]])
  mean = values[:, 0].mean()
  slow = math.sqrt(sum((v - mean) ** 2 for v in values[:, 0]) / 2) / math.sqrt(3)
  np.testing.assert_allclose(standard_error(values), [slow, 0.0], rtol=1e-12)
  assert np.isnan(standard_error(values[:1])).all()
