"""The picture of expert loads."""

import base64
import io
import math

import matplotlib.image
import numpy as np

from deepseek_jax.train.page.heat import (
  colours,
  draw_loads,
  load_figures,
  modality_table,
  png,
  resample,
  squeeze,
  stack_bands,
)


def test_the_picture_holds_the_colours():
  picture = np.array([[0.0, 1.0, 2.0], [9.0, math.nan, 0.5]])
  content = base64.b64decode(png(picture).removeprefix('data:image/png;base64,'))
  pixels = np.round(255 * matplotlib.image.imread(io.BytesIO(content), format='png'))
  assert pixels.shape == (2, 3, 4)
  ramp = colours(255)
  np.testing.assert_array_equal(pixels[0, 0, :3], ramp[0])
  np.testing.assert_array_equal(pixels[0, 1, :3], ramp[127])
  np.testing.assert_array_equal(pixels[0, 2, :3], ramp[254])
  np.testing.assert_array_equal(pixels[1, 0, :3], ramp[254])
  assert pixels[1, 1, 3] == 0
  assert (pixels[..., 3] == 255).sum() == 5


def test_columns_are_even_in_time():
  table = np.arange(4.0)[None, None]
  found = resample(table, np.array([1, 10, 20, 100]))
  # At steps 25, 50, 75 and 100 the latest that was known.
  np.testing.assert_array_equal(found[0, 0], [2, 2, 2, 3])
  assert resample(table[..., :1], np.array([5])).shape == (1, 1, 1)
  assert resample(np.zeros((2, 3, 999)), np.arange(1, 1000)).shape == (2, 3, 240)


def test_many_experts_are_sorted_and_the_extremes_kept():
  band = np.random.default_rng(0).uniform(0.1, 2, (256, 5))
  band[77, 2] = 0.0
  found = squeeze(band, 8)
  assert found.shape == (8, 5)
  assert found[0, 2] == 0
  np.testing.assert_array_equal(found[-1], band.max(axis=0))
  assert (np.diff(found, axis=0) >= 0).all()
  np.testing.assert_array_equal(squeeze(band[:8], 8), band[:8])
  assert squeeze(band[:3], 8).shape == (8, 5)


def test_layers_stand_apart():
  picture, centres = stack_bands(np.ones((3, 16, 2)))
  assert picture.shape == (3 * 16 + 2 * 2, 2)
  assert np.isnan(picture[16:18]).all()
  assert np.isnan(picture).sum() == 8
  np.testing.assert_allclose(centres, [8 / 52, 26 / 52, 44 / 52])


def test_dead_experts_are_counted():
  rows = [
    {'step': 1, 'load': {'layers/1': [1.0, 0.0, 0.0, 0.0], 'mtp/0': [0.5, 0.5]}},
    {'step': 2, 'load': {'layers/1': [0.5, 0.5, 0.0, 0.0], 'mtp/0': [0.5, 0.5]}},
  ]
  lines = {line[0]: line[1:] for line in load_figures(rows)}
  assert lines['1'] == ('2.00', '2 of 4', '100%', '0.500')
  assert lines['mtp/0'] == ('1.00', '0 of 2', '0%', '1.000')
  assert 'Without a token at the end: 2 in layer 1.' in draw_loads(rows)
  assert draw_loads([{'step': 1}]) == ''


def test_where_modalities_go():
  """How crowded the busiest expert is, and how many choices go elsewhere than those of text."""
  loads = {'text': [0.25, 0.25, 0.5, 0.0], 'image': [0.0, 0.0, 0.0, 1.0], 'video': [0.5, 0, 0.5, 0]}
  named = {f'layers/1/{kind}': shares for kind, shares in loads.items()}
  rows = [{'step': 1, 'modality_load': named}, {'step': 2}]
  assert modality_table(rows) == [
    ('1', 'text', '2.00', '—'),
    ('1', 'image', '4.00', '100%'),
    ('1', 'video', '2.00', '25%'),
  ]
  assert modality_table([{'step': 1}]) == []
