"""The router that deals experts in turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.core.config import ConfigError
from deepseek_jax.layers.moe.interface import Limits
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.balanced import Balanced
from deepseek_jax.layers.moe.z_loss import ZLoss
from deepseek_jax.ops.routing import deal


@pytest.mark.parametrize(('experts', 'top_k', 'tokens'), [(5, 2, 37), (8, 3, 45), (4, 4, 1)])
def test_every_expert_has_its_turn(experts, top_k, tokens):
  got, each = deal(tokens, experts, top_k)
  want = [[(n * top_k + k) % experts for k in range(top_k)] for n in range(tokens)]
  np.testing.assert_array_equal(got, want)
  assert int(each) == top_k
  loads = np.bincount(np.asarray(got).ravel(), minlength=experts)
  assert loads.max() - loads.min() <= 1


def test_only_what_is_allowed_is_dealt(setup):
  variables, x, context, apply = setup(Balanced(), 6, 3)
  assert not variables
  allowed = jnp.array([False, True, True, False, True, True])
  got = apply(variables, x, context, Limits(allowed=allowed, top_k=jnp.int32(2)))
  want = [[[1, 2, 4, 5][(n * 2 + k) % 4] for k in range(2)] + [6] for n in range(14)]
  np.testing.assert_array_equal(got.experts, want)
  np.testing.assert_array_equal(got.weights, [[0.5, 0.5, 0]] * 14)
  np.testing.assert_array_equal(got.scores, [[0, 0.25, 0.25, 0, 0.25, 0.25]] * 14)
  nobody = apply(variables, x, context, Limits(allowed=allowed & False, top_k=jnp.int32(2)))
  np.testing.assert_array_equal(nobody.experts, 6)
  np.testing.assert_array_equal(nobody.weights, 0)


def test_it_has_no_logits_for_a_z_loss(packed):
  module = MoE(experts=4, top_k=2, hidden=3, router=Balanced(), z_loss=ZLoss()).build()
  with pytest.raises(ConfigError, match='z_loss: the router Balanced has no logits'):
    jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((2, 7, 4)), packed(2, 7))
