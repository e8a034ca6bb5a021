"""The mixture-of-experts layer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.core.config import ConfigError, wrong_sizes
from deepseek_jax.layers.context import MODALITIES, Context
from deepseek_jax.layers.feed_forward import Remembering, SwiGLU, limit_faults
from deepseek_jax.layers.moe.balance import (
  BatchBalance,
  CommunicationBalance,
  DeviceBalance,
  ExpertBalance,
  SequenceBalance,
  Several,
)
from deepseek_jax.layers.moe.breaker import Breaker
from deepseek_jax.layers.moe.dispatch.all_gather import AllGather
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.dispatch.capacity import Capacity
from deepseek_jax.layers.moe.dispatch.local import Local
from deepseek_jax.layers.moe.experts import Separate, SharedFactor
from deepseek_jax.layers.moe.growth import Growth
from deepseek_jax.layers.moe.interface import Assignment, Limits
from deepseek_jax.layers.moe.placement import Replicas
from deepseek_jax.layers.moe.router.balanced import Balanced
from deepseek_jax.layers.moe.router.expert_attention import ExpertAttention
from deepseek_jax.layers.moe.router.hash import Hash
from deepseek_jax.layers.moe.router.modality import ModalitySigmoid
from deepseek_jax.layers.moe.router.sigmoid import Sigmoid
from deepseek_jax.layers.moe.router.softmax import Softmax
from deepseek_jax.layers.moe.router.sqrt_softplus import SqrtSoftplus
from deepseek_jax.layers.moe.z_loss import ZLoss
from deepseek_jax.layers.weights import add_loss, observe
from deepseek_jax.ops.breaker import output_faults, watch_output
from deepseek_jax.ops.experts import ExpertWeights
from deepseek_jax.ops.routing import expert_load, load_by_group


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoE:
  """Shared experts that see every token, and routed experts that see the tokens they are chosen by.

  Attributes:
    experts: routed experts E.
    top_k: routed experts K a token goes to.
    hidden: hidden units F of one expert.
    limit: of what experts make, shared ones too, as of `SwiGLU`; None is none.
    shared: shared experts, merged to one SwiGLU of `shared` · `hidden` units; None for none.
    router: how experts are chosen.
    balance: auxiliary balance loss, or None.
    z_loss: auxiliary loss on the router's logits, or None.
    dispatch: how tokens reach their experts.
    form: what the experts' matrices are made of.
    placement: how experts lie in more slots than there are experts; None is each in its own.
    growth: how experts or choices become more during training; None is all from the start.
    breaker: what becomes of experts that are not finite; None leaves that to the guard of the run.

  Source: DeepSeekMoE, arXiv 2401.06066; DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
  """

  experts: int
  top_k: int
  hidden: int
  limit: float | None = None
  shared: int | None = 1
  router: Sigmoid | ModalitySigmoid | Softmax | SqrtSoftplus | Hash | ExpertAttention | Balanced = (
    Sigmoid()
  )
  balance: (
    SequenceBalance
    | BatchBalance
    | ExpertBalance
    | DeviceBalance
    | CommunicationBalance
    | Several
    | None
  ) = SequenceBalance()
  z_loss: ZLoss | None = None
  dispatch: Local | Capacity | AllToAll | AllGather = Local()
  form: Separate | SharedFactor = Separate()
  placement: Replicas | None = None
  growth: Growth | None = None
  breaker: Breaker | None = None

  def __post_init__(self):
    errors = wrong_sizes(self, ('experts', 'top_k', 'hidden', 'shared'))
    errors += limit_faults(self.limit)
    if not errors and self.top_k > self.experts:
      errors.append(f'`top_k` is {self.top_k}, more than the {self.experts} `experts` there are')
    if not errors:
      errors += [f'router: {message}' for message in self.router.check(self.experts, self.top_k)]
      for name in ('balance', 'placement'):
        if (part := getattr(self, name)) is not None:
          errors += [f'{name}: {message}' for message in part.check(self.experts)]
      if self.growth is not None:
        errors += [f'growth: {text}' for text in self.growth.check(self.experts, self.top_k)]
    if errors:
      raise ConfigError(errors)

  @property
  def slots(self) -> int:
    """How many sets of matrices lie on the devices: what a dispatch takes for experts."""
    return self.experts if self.placement is None else self.placement.slots

  def empty_cache(self, batch: int, length: int, dtype: DTypeLike, spare: int = 0) -> Any:
    """Returns what the router remembers of rows without a token, [B, …]; None if it does not."""
    if isinstance(self.router, Remembering):
      return self.router.empty_cache(batch, length, dtype, spare)
    return None

  def build(self, name: str | None = None) -> nn.Module:
    """Returns the module."""
    return MoEFeedForward(self, name=name)


class MoEFeedForward(nn.Module):
  """[B, T, D] -> [B, T, D]; reports `router/load` [E], also by modality, and the balance loss."""

  config: MoE

  @nn.compact
  def __call__(self, x: jax.Array, context: Context, cache: Any = None) -> Any:
    """Applies the layer to `x` [B, T, D]; with a cache, returns it beside the result."""
    c, (batch, length, width) = self.config, x.shape
    tokens = x.reshape(batch * length, width)
    matrices = c.form.matrices(self, c.experts, width, c.hidden, x.dtype)
    matrices = dataclasses.replace(matrices, limit=c.limit)
    limits = None if c.growth is None else c.growth.limits(self, c.experts, c.top_k)
    if c.breaker is not None:
      # One token, or one and a token of padding, is a step of decoding.
      matrices, usable, broken, signal = c.breaker.inspect(self, matrices, length <= 2)
      grown = Limits() if limits is None else limits
      allowed = usable if grown.allowed is None else usable & grown.allowed
      limits = Limits(allowed=allowed, top_k=grown.top_k)
    with jax.named_scope('router'):
      memory = {} if cache is None else {'cache': cache}
      # Routers that know no limits are given none.
      limited = {} if limits is None else {'limits': limits}
      router = c.router.build(c.experts, c.top_k, name='router')
      assignment = router(x, context, **limited, **memory)
      written, assignment = assignment.cache, assignment.replace(cache=None)
      load = expert_load(assignment.experts, context.real.reshape(-1), c.experts)
      # Under the router's name, so that the load lies where the router keeps its bias.
      facts = {'load': load}
      if limits is not None and limits.allowed is not None:
        facts['allowed'] = limits.allowed.astype(jnp.float32)
      observe(self, 'router', facts | self._by_modality(assignment, context, facts))
      if c.balance is not None:
        scores = assignment.scores.reshape(batch, length, c.experts)
        experts = assignment.experts.reshape(batch, length, c.top_k)
        add_loss(self, 'balance', c.balance(scores, experts, context.real))
      if c.z_loss is not None:
        if assignment.logits is None:
          raise ConfigError(f'z_loss: the router {type(c.router).__name__} has no logits')
        logits = assignment.logits.reshape(batch, length, c.experts)
        add_loss(self, 'z_loss', c.z_loss(logits, context.real))
    placed = None if c.placement is None else c.placement.around(c.dispatch, self, c.experts)
    dispatch = placed or c.dispatch
    routed, facts = dispatch(tokens, assignment, matrices, context)
    for name, fact in facts.items():
      observe(self, name, fact)
    if c.breaker is not None:
      routed = watch_output(routed, signal)
      self._report_faults(dispatch, broken, tokens, assignment, matrices, routed, context)
    routed = routed.reshape(x.shape)
    if c.shared is not None:
      shared = SwiGLU(hidden=c.shared * c.hidden, limit=c.limit).build('shared')
      routed += shared(x, context)
    return routed if cache is None else (routed, written)

  def _by_modality(
    self, assignment: Assignment, context: Context, facts: dict[str, Any]
  ) -> dict[str, Any]:
    """Returns `modality/load` [M, E], where there is more than text or a router wants to know."""
    modality = context.modality
    if modality is None:
      if not isinstance(self.config.router, ModalitySigmoid):
        return {}
      modality = jnp.zeros_like(context.tokens)
    flat, real = modality.reshape(-1), context.real.reshape(-1)
    experts = assignment.experts
    load = load_by_group(experts, real, flat, len(MODALITIES), self.config.experts)
    return {'modality': {**facts, 'load': load}}

  def _report_faults(
    self,
    dispatch: Callable[..., Any],
    broken: jax.Array,
    tokens: jax.Array,
    assignment: Assignment,
    matrices: ExpertWeights,
    routed: jax.Array,
    context: Context,
  ) -> None:
    """Reports `breaker/weights` and `breaker/output` [E], where anybody asks."""
    if not self.is_mutable_collection('observed') or self.is_initializing():
      return
    # Experts are asked one by one; none of it is differentiated.
    tokens, assignment, matrices, routed = jax.lax.stop_gradient(
      (tokens, assignment, matrices, routed)
    )

    def run(experts: jax.Array, weights: jax.Array) -> jax.Array:
      alone = Assignment(experts=experts, weights=weights, scores=assignment.scores)
      return dispatch(tokens, alone, matrices, context)[0]

    found = output_faults(run, tokens, routed, assignment.experts, self.config.experts)
    observe(self, 'breaker', {'weights': broken.astype(jnp.float32), 'output': found})
