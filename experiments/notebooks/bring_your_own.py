# %% [markdown]
"""# Bring your own: a new attention and a new router, written here

Nothing in the package knows the two kinds below and nothing in it is changed. A config is a frozen
dataclass with a `build`; what it builds is a Flax module; any object with the interface
(`layers/attention/interface.py`, `layers/moe/interface.py`) may stand in the field.
"""

# %%
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import quickstart
from deepseek_jax import lab
from deepseek_jax.layers.attention.latent import MLA, LatentAttention
from deepseek_jax.layers.moe.interface import Assignment
from deepseek_jax.ops.attention.reference import visible

# %% tags=["parameters"]
BASE = quickstart.get_config()
STEPS, SEEDS = 60, 2

# %% [markdown]
"""## An attention of your own

Latent attention whose scores lose a fixed amount for every token of distance, one slope for all
heads (after Press et al., arXiv 2108.12409). The projections are those of MLA; who sees whom, and
how well, is said here. With the cache it also generates.
"""


# %%
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fading(MLA):
  """Latent attention that fades with distance.

  Attributes:
    slope: what a score loses for every token of distance.
  """

  slope: float = 0.05

  def build(self, name=None):
    """Returns the module."""
    return FadingAttention(self, name=name)


class FadingAttention(LatentAttention):
  """[B, T, D] -> [B, T, D]."""

  @nn.compact
  def __call__(self, x, context, cache=None):
    """Mixes `x` [B, T, D]."""
    query, key = self.queries(x, context), self.latents(x, context)
    here = there = context.positions
    mask = visible(here, there, context.segments, context.segments)
    if cache is not None:
      slots = jnp.where(context.real, here, cache.positions.shape[1])
      cache = cache.write(slots, *key, here)
      key, there = (cache.latent, cache.rope_key), cache.positions
      mask = visible(here, there)
    distance = (here[:, :, None] - there[:, None, :]).astype(jnp.float32)
    heads = self.mix(query, key, mask, context, bias=-self.config.slope * distance)
    return self.project(heads, x.shape[-1]), cache


# %% [markdown]
"""## A router of your own

The token's id alone chooses its experts by a formula; nothing is learnt and nothing can collapse
(after Roller et al., arXiv 2106.04426). The package's own `Hash` reads a table and learns how much
each expert counts.
"""


# %%
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenHash:
  """Chooses experts by token id.

  Attributes:
    factor: scatters neighbouring ids.
  """

  factor: int = 7919

  def check(self, experts, top_k):
    """Returns what is wrong: never anything."""
    return []

  def build(self, experts, top_k, name=None):
    """Returns the module."""
    return TokenHashRouter(self, experts, top_k, name=name)


class TokenHashRouter(nn.Module):
  """[B, T, D] -> `Assignment` of N = B·T tokens."""

  config: TokenHash
  experts: int
  top_k: int

  @nn.compact
  def __call__(self, x, context):
    """Routes `x` [B, T, D]."""
    first = context.tokens.reshape(-1, 1) * self.config.factor
    chosen = (first + jnp.arange(self.top_k)) % self.experts
    scores = jnp.sum(jax.nn.one_hot(chosen, self.experts), axis=1) / self.top_k
    weights = jnp.full(chosen.shape, 1 / self.top_k, jnp.float32)
    return Assignment(experts=chosen.astype(jnp.int32), weights=weights, scores=scores)


# %% [markdown]
"""## Against the built-in kinds

The objects go into the config as they are. The hash has no weights to learn: the printed size says
by how many parameters the variants differ.
"""

# %%
variants = {
  'built in': BASE,
  'own attention': lab.override(BASE, {'model.attention': Fading(**vars(BASE.model.attention))}),
  'own router': lab.override(BASE, {'model.feed_forward.router': TokenHash()}),
}

# %%
trials = {name: lab.train(run, steps=STEPS, seeds=SEEDS) for name, run in variants.items()}
lab.plot_curves(trials)

# %%
print(lab.compare(trials))

# %% [markdown]
"""What looks inside the built-in kinds looks inside these too, and the model with the new attention
writes."""

# %%
TEXT = 'And the LORD said unto Moses, Go down to the people.'
maps = lab.attention_maps(trials['own attention'].model, TEXT)
maps.plot(layer=-1)

# %%
load = lab.expert_load(trials['own router'].model, lab.heldout(BASE))
load.plot()

# %%
print(trials['own attention'].model.generate('And the LORD said', max_new_tokens=12))
