"""Modules and passes from the names that the compiler keeps."""

import pytest

from deepseek_jax.pods.address import module_of, phase_of

LOOP = 'jit(step)/while/body/eval_jaxpr/'
STACK = 'Decoder.run/stack/while/body/eval_jaxpr/'


@pytest.mark.parametrize(
  ('name', 'module', 'phase'),
  [
    (
      f'{LOOP}jvp(Decoder.every_depth)/{STACK}segment_1/block_0/feed_forward/shard_map/experts/'
      'cond/branch_0_fun/jit(gmm)/pallas_call',
      'segment_1/feed_forward/experts',
      'forward',
    ),
    (
      f'{LOOP}transpose(jvp(Decoder.every_depth))/{STACK}checkpoint/rematted_computation/'
      'segment_1/block_0/attention/attention.mix_seen/dot_general',
      'segment_1/attention/mix_seen',
      'recompute',
    ),
    (
      f'jit(step)/transpose(jvp(Decoder.every_depth))/{STACK}segment_0/block_1/attention/'
      'attention.project/bthv,hvd->btd/dot_general',
      'segment_0/attention/project',
      'backward',
    ),
    ('jit(step)/optimizer/jit(tree_bias_correction)/sub', 'optimizer', 'update'),
    ('jit(step)/jvp(vocabulary_loss)/while/body/eval_jaxpr/reduce', 'vocabulary_loss', 'forward'),
    (
      'jit(step)/jvp(Decoder.every_depth)/Decoder.run/stack/while/body/jit(dynamic_index)/squeeze',
      'scans',
      'forward',
    ),
    ('jit(step)/jvp(Decoder.every_depth)/Decoder.run/Decoder.embed/embedding/jit(_take)/gather',
     'embedding', 'forward'),
    ('jit(decode_step)/Decoder/Decoder.run/stack/segment_0/block_0/attention/mul',
     'segment_0/attention', 'forward'),
    ('broadcast.33', 'step', 'forward'),
    ('', 'step', 'forward'),
  ],
)  # fmt: skip
def test_names(name, module, phase):
  """Of weights, scans, loops, methods and functions of JAX."""
  assert (module_of(name), phase_of(name)) == (module, phase)
