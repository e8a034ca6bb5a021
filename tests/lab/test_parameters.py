"""Parameters as a table and as a tree."""

import sys

import jax
import pytest

from deepseek_jax import lab
from deepseek_jax.core.config import ConfigError


# treescope 0.1.10 lists all names of NumPy 2.5, also those that warn (November 2026).
@pytest.mark.filterwarnings('ignore:The chararray class is deprecated:DeprecationWarning')
def test_every_parameter_is_shown(model):
  """By canonical address, one line a layer though two layers share a scan."""
  shown = lab.parameters(model)
  text = str(shown)
  total = sum(leaf.size for leaf in jax.tree.leaves(model.variables['params']))
  assert text.endswith(f'{total:,} parameters')
  for address in ('embedding/weight', 'layers/0/attention/output', 'layers/2/feed_forward/gate'):
    assert address in text
  assert 'segment' not in text
  html = shown._repr_html_()
  assert '<' in html
  assert len(html) > 1000


def test_a_missing_package_is_named(model, monkeypatch):
  """With the extra that brings it."""
  monkeypatch.setitem(sys.modules, 'treescope', None)
  with pytest.raises(ConfigError, match=r'treescope.*deepseek_jax\[notebook\]'):
    lab.parameters(model)
