"""Every kind of attention in one model, at equal FLOPs: what does sparsity cost?

python scripts/sweep.py --experiment=experiments/attention_kinds/sweep.py --output=runs/attention
"""

from typing import Any

from configs import quickstart
from deepseek_jax.core.override import override
from deepseek_jax.core.precision import Float32
from deepseek_jax.core.sweep import Sweep, chain, product, seeds
from deepseek_jax.lab.match import FlopsPerToken
from deepseek_jax.layers.attention.csa import CSA
from deepseek_jax.layers.attention.gated import Gated, Log, Share, StraightThrough
from deepseek_jax.layers.attention.hca import HCA
from deepseek_jax.layers.attention.indexer import Indexer
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.mha import MHA
from deepseek_jax.layers.attention.nsa import NSA
from deepseek_jax.layers.attention.recurrent import Recurrent, Slots
from deepseek_jax.layers.attention.rope import RoPE
from deepseek_jax.layers.attention.shared_window import SharedWindow
from deepseek_jax.layers.attention.sparse import DSA, Shared
from deepseek_jax.layers.attention.top_k import TopK
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.residual import Add
from deepseek_jax.models.deepseek_v4 import DeepSeekV4
from deepseek_jax.train.experiment import Experiment

match = FlopsPerToken()
baseline = 'mla'
ATTENTION = 'model.attention'
LATENT: dict[str, Any] = {
  'heads': 4,
  'nope_dim': 24,
  'rope_dim': 8,
  'value_dim': 32,
  'latent': 64,
}
SHARED: dict[str, Any] = {
  'heads': 4,
  'head_dim': 32,
  'rope_dim': 8,
  'query_latent': 64,
  'groups': 2,
  'group_dim': 64,
  'window': 32,
  'rope': RoPE(),
}
DENSE = SwiGLU(hidden=384)
TOP_K = 64
"""Keys of a query where a number says it: an eighth of a row."""


def base() -> Experiment:
  """Returns four dense layers, so that nothing but attention differs, on rows of 512 tokens."""
  changes = {
    'name': 'attention_kinds',
    'model.width': 128,
    'model.dense_layers': 4,
    'model.dense': DENSE,
    'model.attention': MLA(**LATENT),
    'model.mtp': None,
    'balance': None,
    'data.length': 512,
    'data.batch_size': 4,
    'precision': Float32(),
    'train_steps': 120,
    'cadence.sample': None,
    'cadence.evaluate': 60,
    'cadence.save': 60,
  }
  return override(quickstart.get_config(), changes)[0]


def variants() -> Sweep:
  """Returns the kinds; sizes of heads are the same, and each sees about an eighth of a full row."""
  indexer = Indexer(heads=4, dim=16)
  near = {'block': 16, 'window': 16}
  few = {'blocks': 4, 'block': 16, 'span': 16, 'stride': 8, 'window': 32}
  v4 = DeepSeekV4(
    depth=4,
    width=128,
    vocab=base().model.vocab,
    first=SharedWindow(**SHARED),
    sparse=CSA(**SHARED, ratio=4, top_k=16, index_heads=4, index_dim=16),
    heavy=HCA(**SHARED, ratio=32),
    feed_forward=DENSE,
    residual=Add(),
  )
  kinds = {
    'mla': MLA(**LATENT),
    'mha': MHA(heads=4, kv_heads=4, head_dim=32),
    'window': Window(**LATENT, size=60, sinks=4),
    'top_k': TopK(**LATENT, top_k=TOP_K),
    'gated_share': Gated(**LATENT, keep=Share(share=0.3), **near),
    'gated_straight': Gated(**LATENT, keep=Share(share=0.3), gradient=StraightThrough(), **near),
    'gated_log': Gated(**LATENT, keep=Log(factor=6.0), **near),
    'dsa': DSA(**LATENT, indexer=indexer, top_k=TOP_K),
    'dsa_shared': DSA(**LATENT, indexer=indexer, top_k=TOP_K, sharing=Shared(**near)),
    'nsa': NSA(heads=4, kv_heads=2, head_dim=32, value_dim=32, **few),
    'recurrent': Recurrent(**LATENT, size=48, memory=Slots(text=16)),
  }
  models = {name: {ATTENTION: kind} for name, kind in kinds.items()}
  return product(chain(**models, v4={'model': v4}), seeds(3))
