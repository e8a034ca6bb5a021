"""A tiny run with checkpoints, as the tests of what uses trained models need it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from deepseek_jax.core.serialise import to_json
from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.data.source import TextFiles
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.decoder import init_variables
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.remat import SquareRoot
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.train.checkpoint import Checkpoints
from deepseek_jax.train.experiment import Experiment
from deepseek_jax.train.state import fresh_state

SIZES = {'heads': 2, 'nope_dim': 8, 'rope_dim': 4, 'value_dim': 8, 'latent': 16}


@pytest.fixture(scope='session')
def experiment(tmp_path_factory):
  """A tiny run on a text file."""
  text = tmp_path_factory.mktemp('text')
  for number in range(30):
    sentence = f'The number {number} is followed by the number {number + 1}. '
    (text / f'{number}.txt').write_text(sentence * 4, encoding='utf-8')
  return Experiment(
    name='tiny',
    model=DeepSeekV3(
      depth=5,
      width=32,
      vocab=264,
      attention=MLA(**SIZES),
      dense=SwiGLU(hidden=48),
      feed_forward=MoE(experts=4, top_k=2, hidden=16),
    ),
    data=TextCorpus(source=TextFiles(f'{text}/*.txt'), tokenizer=Bytes(), length=32, batch_size=8),
    optimizer=AdamW(peak_lr=1e-2),
    schedule=WarmupStableDecay(warmup_steps=2, decay_fraction=0.5),
    remat=SquareRoot(),
    train_steps=20,
  )


@pytest.fixture(scope='session')
def variables(experiment):
  """Weights as a run would have them."""
  decoder = experiment.model.build(remat=experiment.remat)
  boxed = jax.eval_shape(lambda key: init_variables(decoder, key), jax.random.key(0))
  noise = np.random.default_rng(2)
  return jax.tree.map(
    lambda leaf: jnp.asarray(noise.normal(0, 0.2, leaf.shape), leaf.dtype), nn.meta.unbox(boxed)
  )


@pytest.fixture(scope='session')
def workdir(experiment, variables, tmp_path_factory):
  """A workdir with checkpoints of steps 7 and 9; the weights of 7 are zeros."""
  path = tmp_path_factory.mktemp('run')
  zeros = jax.tree.map(jnp.zeros_like, variables)
  with Checkpoints(path / 'checkpoints') as checkpoints:
    for step, tree in ((7, zeros), (9, variables)):
      state = fresh_state(tree['params'], tree['buffers'], ())
      checkpoints.save(step, state, {'step': step}, to_json(experiment))
  return path
