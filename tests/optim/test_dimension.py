"""Which weights are matrices."""

import pytest
from optax.contrib import MuonDimensionNumbers

from deepseek_jax.optim.dimension import decay_mask, matrix_sides, muon_dimensions


@pytest.mark.parametrize(
  ('axes', 'sides'),
  [
    ((), ()),
    (('embed',), ((0,),)),
    (('embed', 'mlp'), ((0,), (1,))),
    (('layers', 'embed', 'mlp'), ((1,), (2,))),
    (('stage', 'layers', 'expert', 'expert_embed', 'expert_mlp'), ((3,), (4,))),
    (('layers', 'embed', 'heads', None), ((1,), (2, 3))),
    (('layers', 'heads', None, 'embed'), ((1, 2), (3,))),
    (('heads', None), ((0, 1),)),
    (('heads', None, None), ((0, 1), (2,))),
    (('embed', None), ((0,), (1,))),
    (('vocab', 'embed'), ((0,), (1,))),
    # The router maps to experts; counts of copies in front stay counts.
    (('layers', 'embed', 'expert'), ((1,), (2,))),
    (('layers', 'expert'), ()),
    (('expert', 'expert_mlp'), ((1,),)),
    (('layers', 'lanes', 'lanes'), ()),
    (('lanes', 'embed'), ((1,),)),
    (('layers',), ()),
  ],
)
def test_sides(axes, sides):
  assert matrix_sides(axes) == sides


AXES = {
  'embedding': {'table': ('vocab', 'embed')},
  'layers': {
    'attention': {'query': ('layers', 'embed', 'heads', None), 'norm': ('layers', 'latent')},
    'moe': {
      'router': ('layers', 'embed', 'expert'),
      'up': ('layers', 'expert', 'expert_embed', 'expert_mlp'),
      'bias': ('layers', 'expert', 'expert_mlp'),
    },
    'lane_norm': ('layers', 'heads', 'embed'),
  },
  'gain': (),
}


def test_decay_mask_holds_for_matrices_and_embeddings_only():
  assert decay_mask(AXES) == {
    'embedding': {'table': True},
    'layers': {
      'attention': {'query': True, 'norm': False},
      'moe': {'router': True, 'up': True, 'bias': False},
      'lane_norm': False,
    },
    'gain': False,
  }


def test_muon_takes_matrices_without_a_vocabulary():
  assert muon_dimensions(AXES) == {
    'embedding': {'table': None},
    'layers': {
      'attention': {'query': MuonDimensionNumbers((1,), (2, 3)), 'norm': None},
      'moe': {
        'router': MuonDimensionNumbers((1,), (2,)),
        'up': MuonDimensionNumbers((2,), (3,)),
        'bias': None,
      },
      'lane_norm': None,
    },
    'gain': None,
  }


def test_three_sides_are_an_error_that_names_the_weight():
  axes = {'patch': {'kernel': ('layers', None, None, 'embed')}}
  with pytest.raises(ValueError, match=r"'patch/kernel'.*found 3 sides"):
    muon_dimensions(axes)
  assert decay_mask(axes) == {'patch': {'kernel': True}}
