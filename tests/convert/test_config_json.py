"""Models and the published configs that describe them, there and back."""

import json

import pytest

from configs import quickstart, tiny_dsa, tiny_mla, tiny_v4
from deepseek_jax.convert.architecture import model_of
from deepseek_jax.convert.config_json import config_of, trained
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.load import load_config
from deepseek_jax.core.override import override

RELEASED = ('v2_lite', 'v2_236b', 'v3_671b', 'v3_2_671b', 'kimi_k2', 'v4_flash', 'v4_pro')


@pytest.mark.parametrize(
  'name', [*RELEASED, 'tiny_v2', 'tiny_mla', 'tiny_dsa', 'tiny_v4', 'quickstart']
)
def test_there_and_back(name):
  """What was only of use in training is left out."""
  model = load_config(name).model
  config = json.loads(json.dumps(config_of(model, 4096)))
  assert model_of(config) == trained(model)
  assert config['architectures'][0].lower().startswith(config['model_type'].replace('_', ''))


def test_positions():
  """As many as rows had tokens, or as YaRN stretches them to."""
  assert config_of(quickstart.get_config().model, 77)['max_position_embeddings'] == 77
  assert config_of(load_config('v3_671b').model, 77)['max_position_embeddings'] == 163_840


@pytest.mark.parametrize(
  ('config', 'changes', 'message'),
  [
    (tiny_mla, {'attention': 'Window(size=8)'}, 'attention is Window; expected MLA or DSA'),
    (tiny_mla, {'feed_forward.shared': None}, 'has no shared experts'),
    (tiny_mla, {'feed_forward.router': 'Balanced()'}, 'router is Balanced'),
    (tiny_mla, {'feed_forward.limit': 3.0}, r'model.feed_forward.limit is 3.0; a published'),
    (tiny_mla, {'residual': 'HyperConnections()'}, 'model.residual is HyperConnections'),
    (tiny_dsa, {'attention.sharing': 'Shared(block=8, window=8)'}, 'attention.sharing is Shared'),
    (tiny_v4, {'residual': 'Add()'}, 'residual is Add; expected HyperConnections'),
  ],
)
def test_what_no_published_config_can_say(config, changes, message):
  model = override(
    config.get_config(), {f'model.{name}': value for name, value in changes.items()}
  )[0].model
  with pytest.raises(ConfigError, match=message):
    config_of(model, 64)
