"""Parameters and FLOPs of a tiny model against counts by hand."""

import dataclasses

import flax.linen as nn
import jax
import pytest

from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.hyper_connections import HyperConnections
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.cost import (
  active_parameters,
  forward_flops,
  training_flops,
  weights_of,
)
from deepseek_jax.models.decoder import init_variables
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.mtp import MTP
from deepseek_jax.models.remat import SquareRoot
from deepseek_jax.sharding.rules import logical_axes

WIDTH, VOCAB, DEPTH = 10, 100, 6
MODEL = DeepSeekV3(
  depth=DEPTH,
  width=WIDTH,
  vocab=VOCAB,
  attention=MLA(heads=3, nope_dim=4, rope_dim=2, value_dim=5, latent=7, query_latent=8),
  dense=SwiGLU(hidden=11),
  feed_forward=MoE(experts=8, top_k=2, hidden=9, shared=2),
  dense_layers=1,
)

# Query down and up, latent down (with the rotated key), key and value up, output.
ATTENTION = 10 * 8 + 8 * 3 * 6 + 10 * (7 + 2) + 7 * 3 * (4 + 5) + 3 * 5 * 10
DENSE = 3 * 10 * 11
EXPERT = 3 * 10 * 9
ROUTER = 10 * 8
SPARSE = ROUTER + 8 * EXPERT + 2 * EXPERT
SPARSE_ACTIVE = ROUTER + 2 * EXPERT + 2 * EXPERT
# Before attention, before the feed-forward, on both latents.
NORMS = 10 + 10 + 8 + 7
MAIN = ATTENTION * DEPTH + DENSE + SPARSE * 5 + NORMS * DEPTH + 10 + 2 * VOCAB * WIDTH
MTP_PARAMETERS = ATTENTION + SPARSE + NORMS + 20 * 10 + 3 * 10


def count(model, remat=None):
  decoder = model.build(remat=remat)
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  params = nn.meta.unbox(boxed)['params']
  return weights_of(model, params, logical_axes(boxed)['params'], decoder.segments)


@pytest.fixture(scope='module')
def weights():
  return count(MODEL)


@pytest.fixture(scope='module')
def weights_with_mtp():
  return count(dataclasses.replace(MODEL, mtp=MTP(depth=2)))


def test_parameters(weights, weights_with_mtp):
  assert sum(w.size for w in weights) == MAIN
  assert sum(w.size for w in weights_with_mtp) == MAIN + 2 * MTP_PARAMETERS


ACTIVE = ATTENTION * DEPTH + DENSE + SPARSE_ACTIVE * 5 + VOCAB * WIDTH
MTP_ACTIVE = ATTENTION + SPARSE_ACTIVE + 20 * 10


def test_active_parameters(weights, weights_with_mtp):
  # The head is met, the embedding is looked up, and norms are no matrices.
  assert active_parameters(weights) == ACTIVE
  assert active_parameters(weights_with_mtp) == ACTIVE + 2 * MTP_ACTIVE


def test_flops(weights, weights_with_mtp):
  length = 5
  # 3 heads; a pair costs 6 multiply-adds of scores and 5 of values; 3 tokens are seen on average.
  mixing = 2 * 3 * (6 + 5) * 3
  want = 2 * ACTIVE + DEPTH * mixing
  assert forward_flops(MODEL, weights, length) == want
  assert training_flops(MODEL, weights, length) == 3 * want
  # Each depth runs a layer of its own and the shared head again.
  want += 2 * (2 * MTP_ACTIVE + mixing + 2 * VOCAB * WIDTH)
  model = dataclasses.replace(MODEL, mtp=MTP(depth=2))
  assert forward_flops(model, weights_with_mtp, length) == want


def test_a_window_costs_less():
  attention = {f.name: getattr(MODEL.attention, f.name) for f in dataclasses.fields(MLA)}
  window = Window(**attention, size=2, sinks=0)
  model = dataclasses.replace(MODEL, attention=window)
  weights = count(model)
  assert active_parameters(weights) == ACTIVE
  # Nine pairs of five tokens.
  assert forward_flops(model, weights, 5) == 2 * ACTIVE + DEPTH * 2 * 3 * 11 * 9 / 5


def test_lanes_cost_what_mixes_them():
  model = dataclasses.replace(MODEL, residual=HyperConnections(lanes=3))
  weights = count(model)
  # 3 + 3 + 9 numbers of a site, made of 3 lanes; two sites a layer, and the head's 3 numbers.
  site, head = 3 * WIDTH * 15, 3 * WIDTH * 3
  sites = 2 * DEPTH
  assert sum(w.size for w in weights) == MAIN + sites * (site + 15 + 3) + head + 3 + 1
  assert active_parameters(weights) == ACTIVE + sites * site + head
  # A site reads 3 lanes, mixes them to 3 and adds the output to 3.
  plain = forward_flops(MODEL, count(MODEL), 5)
  lanes = sites * 2 * WIDTH * (3 + 9 + 3)
  assert forward_flops(model, weights, 5) == plain + 2 * (sites * site + head) + lanes


def test_grouping_changes_no_count(weights):
  regrouped = count(MODEL, SquareRoot())
  assert {w.address for w in regrouped} != {w.address for w in weights}
  assert sum(w.size for w in regrouped) == MAIN
  assert active_parameters(regrouped) == ACTIVE


def test_shares_and_addresses(weights):
  used = {w.address: w.used for w in weights}
  assert used['embedding/weight'] == 0
  assert used['head/weight'] == 1
  assert used['stack/segment_1/block_0/feed_forward/gate'] == 2 / 8
  assert used['stack/segment_1/block_0/feed_forward/shared/gate'] == 1
  assert used['stack/segment_1/block_0/feed_forward/router/weight'] == 1
  assert used['stack/segment_0/block_0/feed_forward/gate'] == 1
