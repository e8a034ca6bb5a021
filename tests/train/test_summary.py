"""What a run would be, in words."""

import dataclasses

from configs import tiny_mla
from deepseek_jax.models.pipeline import Interleaved
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.train.summary import describe_layers, describe_stages


def test_stages_are_described():
  """What lies where, and how long stages are idle: one dense layer, five with experts."""
  base = tiny_mla.get_config()
  assert describe_stages(base) == 'no pipeline'
  run = dataclasses.replace(
    base,
    model=dataclasses.replace(base.model, depth=6),
    pipeline=Interleaved(microbatches=4),
    mesh=MeshConfig(stage=2),
  )
  words = ' '.join(describe_stages(run).split())
  for part in (
    'pipeline Interleaved',
    'stages 2, 2 layers each',
    'layers on every stage 2',
    'ticks of a forward pass 9',
    'of them idle (the bubble) 11.1%',
  ):
    assert part in words, part
  assert describe_layers(run.model, run.segments).count('over stages') == 2
