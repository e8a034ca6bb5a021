"""Curves of trials: means, bands, names."""

import dataclasses

import numpy as np
import pytest

from deepseek_jax import lab
from deepseek_jax.core.config import ConfigError
from deepseek_jax.lab.picture import running_mean


def test_running_mean():
  """Of each value and those before it."""
  values = np.array([4.0, 1.0, 7.0, 2.0, 0.0])
  for window in (1, 2, 3, 9):
    slow = [values[max(i - window + 1, 0) : i + 1].mean() for i in range(5)]
    np.testing.assert_allclose(running_mean(values, window), slow, rtol=1e-12)


def test_curves_are_means_with_a_band(trial):
  """Of one standard error where there are several seeds, and none where there is one."""
  one = dataclasses.replace(
    trial, seeds=(0,), curves={name: rows[:1] for name, rows in trial.curves.items()}
  )
  picture = lab.plot_curves({'two': trial, 'one': one}, smooth=1)
  (axes,) = picture.axes
  mean = trial.curves['loss'].mean(axis=0)
  np.testing.assert_allclose(axes.lines[0].get_ydata(), mean, rtol=1e-12)
  np.testing.assert_allclose(axes.lines[1].get_ydata(), trial.curves['loss'][0], rtol=1e-12)
  assert len(axes.collections) == 1
  error = trial.curves['loss'].std(axis=0, ddof=1) / np.sqrt(2)
  edge = axes.collections[0].get_paths()[0].vertices
  assert edge[:, 1].max() == pytest.approx((mean + error).max())
  assert edge[:, 1].min() == pytest.approx((mean - error).min())
  names = [text.get_text() for text in axes.get_legend().get_texts()]
  assert names == ['two (2 seeds)', 'one (1 seed)']
  assert 'nats' in axes.get_ylabel()
  assert picture._repr_png_().startswith(b'\x89PNG')


def test_bad_input_is_told(trial):
  """With what could have been meant."""
  with pytest.raises(ConfigError, match='`los`; did you mean `loss`'):
    lab.plot_curves({'a': trial}, metric='los')
  with pytest.raises(ConfigError, match='at least 1 trial'):
    lab.plot_curves({})
  with pytest.raises(ConfigError, match='at least 1 step'):
    lab.plot_curves({'a': trial}, smooth=0)
