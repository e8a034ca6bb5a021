"""A ladder of models: one dial, the depth, sets everything else by stated rules.

For questions about scale: what holds on three rungs may hold on the next. Text is read as bytes, so
that nearly all of the compute is in the layers, and losses are bits per byte without conversion.

Rules, and where they come from (d is the depth):
- width 16·d, so that all rungs have one shape. A width over depth of 16 is narrow; loss depends
  weakly on it. Kaplan et al., arXiv 2001.08361, figure 5.
- d heads of 16 channels, so that together they are as wide as the stream; of a key, twice as many
  channels without position as with. DeepSeek-V3, arXiv 2412.19437, section 4.2. The latent is half
  the width, a rule of our own: the published one is a fourteenth, of a width 74 times as large.
- a dense feed-forward of 3 widths (the usual 8/3, rounded up); experts of a quarter of it, of which
  1 is shared and 3 are chosen, so that a layer of experts costs what the dense one costs; the first
  layer is dense. DeepSeekMoE, arXiv 2401.06066, sections 3.1, 3.2 and 5.1.2.
- 8·d experts: more experts for larger models, as from DeepSeek-V2 to V3; the factor is our own.
- 20 tokens for each parameter that a token meets. Hoffmann et al., arXiv 2203.15556, table 3.
- batch 0.2920·C^0.3271 tokens, to the nearest multiple of 8 rows, which eight devices can share,
  and learning rate 0.3118·C^-0.1250, at a compute of C FLOPs. DeepSeek LLM, arXiv 2401.02954,
  equation 1: fitted on dense models from 1e17 FLOPs on, used here for experts four orders of
  magnitude below.
- a twentieth of the steps to warm up, the last 40 % to decay, as in configs/cpu_hour.py.

Rungs for two CPU cores, by `--config='ladder(depth=…)'`; `met` are parameters that a token meets:

  depth  width  experts      met  tokens  rows  steps  peak rate    FLOPs    time
      2     32       16   36,096   723 K     8    353     0.0118  2.5e+11   1/3 min
      3     48       24  105,984   2.1 M     8  1,035    0.00908  1.9e+12  1 1/2 min
      4     64       32  238,080   4.8 M    16  1,163    0.00748  9.2e+12     7 min
      5     80       40  453,120   9.1 M    32  1,107     0.0064  3.2e+13    21 min
      6     96       48  771,840    15 M    40  1,508    0.00563  8.9e+13   not measured

Times are tokens by the tokens a second of 40 steps, AMD EPYC with AVX2, November 2026; that of
depth 2 is of a run on one core.

Command:  python scripts/train.py --config='ladder(depth=3)' --workdir=runs/ladder_3
Hardware: 2 CPU cores.
Time:     that of the rung, half a minute of compilation, and evaluation.
"""

import math

import jax
from flax import linen as nn

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.models.cost import active_parameters, training_flops, weights_of
from deepseek_jax.models.decoder import init_variables
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.optim.balance import SignBias
from deepseek_jax.optim.optimizer import AdamW
from deepseek_jax.optim.schedule import WarmupStableDecay
from deepseek_jax.sharding.rules import logical_axes
from deepseek_jax.train.experiment import Cadence, Experiment

LENGTH = 256
ROWS = 8
TOKENS_PER_PARAMETER = 20


def get_config(depth: int = 3) -> Experiment:
  """Returns the run of one rung.

  Args:
    depth: the dial, 2 or more: the first layer is dense.

  Raises:
    ConfigError: the depth is below 2.
  """
  if depth < 2:
    raise ConfigError(f'depth: found {depth}, expected 2 or more: the first layer has no experts')
  model = rung(depth)
  parameters, flops = cost(model)
  tokens = TOKENS_PER_PARAMETER * parameters
  compute = flops * tokens
  rows = ROWS * max(round(batch_tokens(compute) / LENGTH / ROWS), 1)
  steps = math.ceil(tokens / (rows * LENGTH))
  return Experiment(
    name=f'ladder_{depth}',
    model=model,
    data=TextCorpus(tokenizer=Bytes(), length=LENGTH, batch_size=rows),
    # Three digits: more would claim that the rule knows them.
    optimizer=AdamW(peak_lr=float(f'{learning_rate(compute):.3g}')),
    schedule=WarmupStableDecay(warmup_steps=max(steps // 20, 1), decay_fraction=0.4, final=0.05),
    train_steps=steps,
    # Ten times DeepSeek's rate, for runs thousands of times shorter.
    balance=SignBias(rate=1e-2),
    cadence=Cadence(log=10, evaluate_batches=16),
    prompts=('The people of the United States', 'And the LORD said unto', 'She was very'),
  )


def rung(depth: int) -> DeepSeekV3:
  """Returns the model of one rung."""
  width = 16 * depth
  hidden = 3 * width
  return DeepSeekV3(
    depth=depth,
    width=width,
    # 259 bytes and special tokens, rounded up so that 8 devices can share them.
    vocab=264,
    attention=MLA(heads=depth, nope_dim=16, rope_dim=8, value_dim=16, latent=width // 2),
    dense=SwiGLU(hidden=hidden),
    dense_layers=1,
    feed_forward=MoE(experts=8 * depth, top_k=3, hidden=hidden // 4, shared=1),
  )


def cost(model: DeepSeekV3) -> tuple[int, float]:
  """Returns the parameters that a token meets, and the FLOPs of training on it."""
  boxed = jax.eval_shape(lambda key: init_variables(model.build(), key), jax.random.key(0))
  weights = weights_of(model, nn.meta.unbox(boxed)['params'], logical_axes(boxed)['params'])
  return active_parameters(weights), training_flops(model, weights, LENGTH)


def batch_tokens(compute: float) -> float:
  """Returns the tokens of a batch that suit a compute of so many FLOPs.

  Source: DeepSeek LLM, arXiv 2401.02954, equation 1.
  """
  return 0.2920 * compute**0.3271


def learning_rate(compute: float) -> float:
  """Returns the peak learning rate that suits a compute of so many FLOPs.

  Source: DeepSeek LLM, arXiv 2401.02954, equation 1.
  """
  return 0.3118 * compute**-0.1250
