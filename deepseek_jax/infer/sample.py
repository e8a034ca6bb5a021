"""The ways to choose the next token when generating."""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.core.config import ConfigError
from deepseek_jax.ops import sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
  """Always takes the most likely token."""

  def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
    """Chooses one token a row.

    Args:
      logits: float [B, V].
      key: not used; there so that all kinds are called alike.

    Returns:
      int32 [B].
    """
    del key
    return sampling.take_best(logits)

  def probabilities(self, logits: jax.Array) -> jax.Array:
    """Returns how likely each token is to be chosen, float32 [B, V], for logits [B, V]: 0 or 1."""
    return jax.nn.one_hot(sampling.take_best(logits), logits.shape[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """Draws the next token at random, after dropping unlikely ones.

  Applied in this order, each to what the one before left: temperature, `top_k`, `top_p`, `min_p`.
  `top_p` is thus a share of the mass that `top_k` left.

  Attributes:
    temperature: above 1 draws more evenly, below 1 more certainly.
    top_k: keep this many most likely tokens; None keeps all.
    top_p: keep the fewest most likely tokens with this much probability; None keeps all.
    min_p: keep tokens at least this many times as likely as the most likely one; None keeps all.
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None

  def __post_init__(self):
    """Validates the fields.

    Raises:
      ConfigError: a field is out of its range; the message lists all of them.
    """
    faults = []
    if not 0 < self.temperature < float('inf'):
      faults.append(
        f'Sample.temperature: found {self.temperature!r}, expected a finite number above 0; '
        'to always take the most likely token use Greedy()'
      )
    if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
      faults.append(f'Sample.top_k: found {self.top_k!r}, expected None or a count of at least 1')
    for name in ('top_p', 'min_p'):
      value = getattr(self, name)
      if value is not None and not 0 < value <= 1:
        faults.append(f'Sample.{name}: found {value!r}, expected None or a share in (0, 1]')
    if faults:
      raise ConfigError(faults)

  def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
    """Chooses one token a row.

    Args:
      logits: float [B, V].
      key: typed keys (`jax.random.key`) [B], one a row: a row's draw depends only on its own
        logits and key, not on the batch it is in.

    Returns:
      int32 [B].
    """
    return sampling.sample(self._kept(logits), key)

  def probabilities(self, logits: jax.Array) -> jax.Array:
    """Returns how likely each token is to be chosen, float32 [B, V], for logits [B, V]."""
    return jax.nn.softmax(self._kept(logits), axis=-1)

  def _kept(self, logits: jax.Array) -> jax.Array:
    logits = sampling.apply_temperature(logits, self.temperature)
    if self.top_k is not None:
      logits = sampling.keep_top_k(logits, self.top_k)
    if self.top_p is not None:
      logits = sampling.keep_top_p(logits, self.top_p)
    if self.min_p is not None:
      logits = sampling.keep_min_p(logits, self.min_p)
    return logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Within:
  """Takes only the first ids of the vocabulary, as another kind chooses among them.

  Attributes:
    vocab: ids from 0 that may be chosen.
    sampler: the kind that chooses.
  """

  vocab: int
  sampler: 'Sampler'

  def __post_init__(self):
    """Refuses an empty vocabulary."""
    if self.vocab < 1:
      raise ConfigError(f'Within.vocab: found {self.vocab}, expected at least 1 id')

  def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
    """Chooses one token a row: logits [B, V], typed keys [B] -> int32 [B]."""
    return self.sampler(logits[:, : self.vocab], key)

  def probabilities(self, logits: jax.Array) -> jax.Array:
    """Returns how likely each token is to be chosen, float32 [B, V], for logits [B, V]."""
    inner = self.sampler.probabilities(logits[:, : self.vocab])
    return jnp.pad(inner, ((0, 0), (0, logits.shape[1] - inner.shape[1])))


Sampler = Greedy | Sample | Within
