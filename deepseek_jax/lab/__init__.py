"""The notebook's front door: change a config, train a little, compare, look inside.

No flags, no mesh, no workdir; every function takes values and returns values.
"""

from deepseek_jax.hub import Pretrained, from_pretrained
from deepseek_jax.lab.attention import AttentionMaps, attention_maps
from deepseek_jax.lab.experts import ExpertLoad, expert_load, token_class
from deepseek_jax.lab.lens import LogitLens, logit_lens
from deepseek_jax.lab.parameters import Parameters, parameters
from deepseek_jax.lab.picture import Picture, plot_curves
from deepseek_jax.lab.trial import Trial, compare, heldout, init, override, train
from deepseek_jax.lab.walk import walk

__all__ = [
  'AttentionMaps',
  'ExpertLoad',
  'LogitLens',
  'Parameters',
  'Picture',
  'Pretrained',
  'Trial',
  'attention_maps',
  'compare',
  'expert_load',
  'from_pretrained',
  'heldout',
  'init',
  'logit_lens',
  'override',
  'parameters',
  'plot_curves',
  'token_class',
  'train',
  'walk',
]
