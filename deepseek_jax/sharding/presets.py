"""Ready tables of sharding rules; pick one, or write another `Rules`."""

import dataclasses

from deepseek_jax.sharding.rules import Rules

FSDP = Rules(
  batch=('replica', 'data'),
  embed=('data',),
  latent=('data',),
  expert_embed=('data',),
)
"""Every device holds a slice of every weight and its own rows of the batch (ZeRO-3)."""

TENSOR = dataclasses.replace(
  FSDP,
  act_heads=('model',),
  act_vocab=('model',),
  heads=('model',),
  mlp=('model',),
  vocab=('model',),
  expert_mlp=('model',),
)
"""FSDP over `data`; heads, hidden units and vocabulary over `model` (Megatron)."""

EXPERT = dataclasses.replace(
  FSDP,
  batch=('replica', 'data', 'expert'),
  act_expert=('expert',),
  expert=('expert',),
)
"""FSDP over `data`; whole experts over `expert`, which also carries rows of the batch."""

CONTEXT = dataclasses.replace(
  TENSOR,
  batch=('replica', 'data', 'expert'),
  seq=('seq',),
  act_expert=('expert',),
  embed=('data', 'seq'),
  latent=('data', 'seq'),
  expert=('expert',),
  expert_embed=('data', 'seq'),
)
"""The tokens of a row over `seq`, which shards weights as `data` does; beside it TENSOR and EXPERT,
where the mesh has more than one device along `model` or `expert`."""

PIPELINE = dataclasses.replace(
  EXPERT,
  # Last, so that the rows of a stage are neighbours of those of the others in its pipeline.
  batch=('replica', 'data', 'expert', 'stage'),
  stage=('stage',),
)
"""EXPERT, and layers over `stage`. What is no layer of a stage is whole on each of them (but for
what lies on `data` and `expert`), and each does it for its share of the rows."""

POD = dataclasses.replace(CONTEXT, batch=PIPELINE.batch, stage=PIPELINE.stage)
"""CONTEXT and PIPELINE: all six axes of the mesh, any of which may have a single device."""
