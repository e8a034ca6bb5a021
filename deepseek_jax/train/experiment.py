"""The one object that says what a run is."""

import dataclasses
from typing import Annotated, Any

from deepseek_jax.core.annotation import Presets
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.precision import Fastest, Float32, Precision
from deepseek_jax.data.captions import ImageCaptions
from deepseek_jax.data.media.rows import MediaCorpus
from deepseek_jax.data.pipeline import TextCorpus
from deepseek_jax.data.recall import Recall
from deepseek_jax.layers.attention.interface import SharesRows, in_order_only
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.attention.mha import MHA
from deepseek_jax.layers.attention.window import Window
from deepseek_jax.layers.context_parallel import ContextParallel, Contiguous, Ring
from deepseek_jax.layers.moe.dispatch.capacity import Capacity
from deepseek_jax.layers.moe.moe import MoE
from deepseek_jax.layers.moe.router.expert_attention import ExpertAttention
from deepseek_jax.layers.moe.router.hash import Hash
from deepseek_jax.models.contrastive import Contrastive
from deepseek_jax.models.decoder import plan_segments
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.deepseek_v4 import DeepSeekV4
from deepseek_jax.models.dual_stream import DualStream
from deepseek_jax.models.multimodal import Multimodal
from deepseek_jax.models.pipeline import AXIS, GPipe, Interleaved, Stages
from deepseek_jax.models.plan import Segment
from deepseek_jax.models.remat import Compressed, EveryLayer, Save, SquareRoot
from deepseek_jax.optim.balance import ProportionalBias, SignBias
from deepseek_jax.optim.compression import Exact, LocalSteps, Quantised
from deepseek_jax.optim.ema import EMA
from deepseek_jax.optim.optimizer import AdamW, Muon
from deepseek_jax.optim.schedule import Schedule
from deepseek_jax.sharding.mesh import MeshConfig
from deepseek_jax.sharding.presets import CONTEXT, EXPERT, FSDP, PIPELINE, POD, TENSOR
from deepseek_jax.sharding.rules import Rules, shard_count
from deepseek_jax.train.guard import Guard
from deepseek_jax.train.init_from import InitFrom
from deepseek_jax.train.objective import NextToken
from deepseek_jax.train.placement import Rebalance, check_placement, expert_devices
from deepseek_jax.train.replicas import check_replicas
from deepseek_jax.train.snapshot import Snapshot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cadence:
  """How often, in steps, a run does what is not training.

  Attributes:
    log: writes metrics.
    evaluate: measures the held-out loss; the last step always does. None is only then.
    evaluate_batches: batches of each evaluation but the last, which takes all; None takes all.
    sample: writes continuations of the prompts; None never.
    save: writes a checkpoint; the last step always does. None is only then.
    keep: newest checkpoints that are kept; the best by held-out bits per byte is kept too.
    snapshot: how often each process copies its part of the state to a disk beside it, to go on
      from there after a fault; None never.
  """

  log: int = 10
  evaluate: int | None = None
  evaluate_batches: int | None = None
  sample: int | None = None
  save: int | None = None
  keep: int = 3
  snapshot: Snapshot | None = None

  def __post_init__(self):
    errors = [
      f'`{field.name}` is {value}; expected 1 or more'
      for field in dataclasses.fields(self)
      if isinstance(value := getattr(self, field.name), int) and value < 1
    ]
    if errors:
      raise ConfigError(errors)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """A complete run; two equal experiments give the same numbers on the same mesh.

  Attributes:
    name: what the run is called.
    model: the family and its dials.
    data: text, captioned pictures, several modalities or a task that is made up; tokenizer, rows.
    optimizer: what turns gradients into updates, with its peak learning rate.
    schedule: factor on the peak learning rate over training.
    train_steps: updates of the whole run.
    objective: what is minimised.
    balance: how the routers' selection bias follows the load, or None to leave it alone.
    placement: how often, and by what policy, experts with replicas are placed by their load, or
      None to leave them where they are.
    guard: which steps are skipped, and when the run stops for it; None takes every step.
    ema: averaged weights that are kept beside the weights, or None.
    reduction: how gradients of replicas (slices joined by a slow network) are added up; None leaves
      it to the compiler, as one sum over the whole batch.
    microbatches: equal parts of a batch that are run one after the other; gradients are summed.
    remat: what the backward pass recomputes, or None to remember everything.
    pipeline: how microbatches go through the stages of the mesh, or None where there is one.
    precision: compute dtype; parameters stay float32.
    mesh: how devices are laid out.
    rules: which array axes lie on which mesh axes.
    context_parallel: how tokens reach keys where `rules` spreads the tokens of a row.
    cadence: how often the run logs, evaluates, samples and saves.
    prompts: texts that samples continue.
    init_from: another run's checkpoint whose weights a new run begins with, or None.
    trainable: patterns of canonical addresses, such as 'layers/*/attention/indexer/*'; what none
      fits stays as it is. None trains everything.
    seed: of the weights and all noise.
  """

  name: str
  model: DeepSeekV3 | DeepSeekV4 | Multimodal | DualStream | Contrastive
  data: TextCorpus | ImageCaptions | Recall | MediaCorpus
  optimizer: AdamW | Muon
  schedule: Schedule
  train_steps: int
  objective: NextToken = NextToken()
  balance: SignBias | ProportionalBias | None = SignBias()
  placement: Rebalance | None = None
  guard: Guard | None = Guard()
  ema: EMA | None = None
  reduction: Exact | Quantised | LocalSteps | None = None
  microbatches: int = 1
  remat: EveryLayer | SquareRoot | Save | Compressed | None = None
  pipeline: GPipe | Interleaved | None = None
  precision: Precision = Float32()
  mesh: MeshConfig = MeshConfig()
  rules: Annotated[
    Rules,
    Presets(FSDP=FSDP, TENSOR=TENSOR, EXPERT=EXPERT, CONTEXT=CONTEXT, PIPELINE=PIPELINE, POD=POD),
  ] = FSDP
  context_parallel: ContextParallel = Ring()
  cadence: Cadence = Cadence()
  prompts: tuple[str, ...] = ()
  init_from: InitFrom | None = None
  trainable: tuple[str, ...] | None = None
  seed: int = 0

  def __post_init__(self):
    errors = []
    if self.train_steps < 1:
      errors.append(f'`train_steps` is {self.train_steps}; expected 1 or more')
    if self.microbatches < 1:
      errors.append(f'`microbatches` is {self.microbatches}; expected 1 or more')
    elif self.data.batch_size % self.microbatches:
      errors.append(
        f'`microbatches` is {self.microbatches}, which does not divide data.batch_size '
        f'{self.data.batch_size}'
      )
    if self.trainable == ():
      errors.append('`trainable` is empty: nothing would be trained; None trains everything')
    if not 0 <= self.seed < 2**32:
      errors.append(f'`seed` is {self.seed}; expected 0 to {2**32 - 1}')
    if errors:
      raise ConfigError(errors)

  @property
  def stages(self) -> Stages | None:
    """The pipeline on the stages of the mesh, or None without one."""
    return None if self.pipeline is None else Stages(self.pipeline, self.mesh.stage)

  @property
  def segments(self) -> tuple[Segment, ...]:
    """The scans that run the layers, in training and in checkpoints."""
    return plan_segments(self.model, self.remat, self.stages)

  def check(self, devices: int) -> list[str]:
    """Returns everything that is wrong between the parts on `devices` devices, as messages."""
    errors = []
    for name, build in (
      ('schedule', lambda: self.schedule.build(self.train_steps)),
      ('objective.mtp_schedule', lambda: self.objective.build(self.train_steps)),
      ('balance', lambda: self.balance and self.balance.build(self.train_steps)),
      ('mesh', lambda: self.mesh.sizes(devices)),
    ):
      try:
        build()
      except ConfigError as error:
        errors += [
          message if message.startswith(name) else f'{name}: {message}'
          for message in error.messages
        ]
    try:
      vocab = self.data.tokenizer.build().vocab_size
      if vocab > self.model.vocab:
        errors.append(
          f'model.vocab is {self.model.vocab}, fewer than the {vocab} tokens of data.tokenizer '
          f'{type(self.data.tokenizer).__name__}'
        )
    except ConfigError as error:
      errors += [f'data.tokenizer: {message}' for message in error.messages]
    if not any(message.startswith('mesh') for message in errors):
      errors += self._check_batch(devices) + self._check_dispatch(devices)
      errors += check_shared_rows(self, devices)
      errors += self._check_placement(devices) + self._check_stages(devices)
    return errors + self._check_tables() + self._check_experts() + self._check_images()

  def _mixtures(self) -> list[MoE]:
    """Every different mixture of experts, in the order of the layers."""
    kinds = dict.fromkeys(block.feed_forward for block in self.model.layers())
    return [kind for kind in kinds if isinstance(kind, MoE)]

  def _check_tables(self) -> list[str]:
    """Tables of hash routers are there and fit the vocabulary."""
    errors = []
    for moe in self._mixtures():
      if isinstance(moe.router, Hash):
        errors += [
          f'model: feed_forward.router Hash: {message}'
          for message in moe.router.check_model(self.model.vocab, moe.experts, moe.top_k)
        ]
    return errors

  def _check_experts(self) -> list[str]:
    """Experts grow within the run, and what a breaker cannot save is skipped."""
    errors = []
    for moe in self._mixtures():
      if moe.breaker is not None and self.guard is None:
        errors.append(
          'feed_forward.breaker counts on a guard to skip the step of a fault; guard is None'
        )
      if isinstance(self.reduction, LocalSteps) and (moe.growth or moe.breaker):
        errors.append(
          'reduction is LocalSteps, whose replicas have weights of their own between exchanges; '
          'experts that come and go (feed_forward.growth, .breaker) are made anew in common ones'
        )
      if moe.growth is not None:
        try:
          moe.growth.stages(moe.experts, moe.top_k, self.train_steps)
        except ConfigError as error:
          errors += [f'feed_forward.growth: {message}' for message in error.messages]
    return errors

  def _check_dispatch(self, devices: int) -> list[str]:
    """Every mixture of experts gets its tokens on this mesh."""
    sizes = self.mesh.sizes(devices)
    return [
      f'dispatch {type(moe.dispatch).__name__}: {message}'
      for moe in self._mixtures()
      for message in moe.dispatch.check(moe.slots, sizes, self.rules)
    ]

  def _check_stages(self, devices: int) -> list[str]:
    """Layers can be cut over the stages of the mesh, and rows into microbatches for them."""
    stages = self.stages
    if stages is None:
      used = any(AXIS in axes for axes in dataclasses.asdict(self.rules).values())
      # An axis of that name may do something else.
      if self.mesh.stage == 1 or (used and not self.rules.stage):
        return []
      return [
        f'mesh.stage is {self.mesh.stage}, but pipeline is None: every stage would hold all '
        "layers; try pipeline='GPipe(microbatches=4)' and rules=PIPELINE"
      ]
    rows = self.data.batch_size // self.microbatches
    errors = stages.check(self.mesh.sizes(devices), self.rules, rows)
    try:
      plan_segments(self.model, self.remat, stages)
    except ConfigError as error:
      errors += error.messages
    return [f'pipeline {type(self.pipeline).__name__}: {message}' for message in errors]

  def _check_placement(self, devices: int) -> list[str]:
    """Slots of experts can be filled on this mesh."""
    sharing = expert_devices(self.rules, self.mesh.sizes(devices))
    return check_placement(self.placement, self._mixtures(), sharing)

  def _check_images(self) -> list[str]:
    """What the data shows and what the model sees are the same media."""
    model, data = self.model, self.data
    name, kind = type(data).__name__, type(model).__name__
    if not data.media:
      if not isinstance(model, Multimodal):
        return []
      return [f'model is {kind}, but data.{name} has no media to learn its encoders from']
    if not isinstance(model, Multimodal):
      return [f'data is {name}, but model.{kind} sees no media; try Multimodal']
    return model.check_media(
      {kind: (shape.values[1:], shape.dtype, shape.slots) for kind, shape in data.media.items()}
    )

  def _check_batch(self, devices: int) -> list[str]:
    try:
      spec = self.rules.spec(('batch', 'seq'))
    except ConfigError as error:
      return [f'rules: {message}' for message in error.messages]
    errors = []
    row_shards, token_shards = (shard_count(entry, self.mesh.sizes(devices)) for entry in spec)
    rows = self.data.batch_size // self.microbatches
    if rows % row_shards:
      each = f' in each of {self.microbatches} microbatches' if self.microbatches > 1 else ''
      errors.append(
        f'data.batch_size {self.data.batch_size} gives {rows} rows{each}, not divisible by the '
        f'{row_shards} devices that share the batch (rules.batch {self.rules.batch})'
      )
    if self.reduction is not None:
      errors += check_replicas(self.rules)
    if self.data.length % token_shards:
      errors.append(
        f'data.length is {self.data.length}, not divisible by the {token_shards} devices that '
        f'share a sequence (rules.seq {self.rules.seq})'
      )
    return errors


def check_shared_rows(experiment: Experiment, devices: int) -> list[str]:
  """Returns what keeps devices from sharing the tokens of a row, as messages."""
  sizes, model = experiment.mesh.sizes(devices), experiment.model
  shards, length = shard_count(experiment.rules.seq, sizes), experiment.data.length
  if sizes['seq'] > 1 and not any('seq' in axes for axes in vars(experiment.rules).values()):
    return [
      f'mesh.seq is {sizes["seq"]}, but no rule has anything on that axis: its devices would all '
      'do the same; the preset CONTEXT has the tokens of a row there'
    ]
  if shards == 1 or length % shards:
    return []
  if experiment.data.media:
    return [
      f'rules.seq {experiment.rules.seq} has {shards} devices that share a row; media are not '
      'spread over them: let each have rows of its own'
    ]
  order = experiment.context_parallel.order
  pieces = len(order.chunks(shards))
  if length % pieces:
    return [
      f'context_parallel.order {type(order).__name__} cuts data.length {length} into {pieces} '
      f'chunks for {shards} devices, which do not divide it'
    ]
  layers = model.layers()
  blocks = dict.fromkeys([*layers, *([] if model.mtp is None else [model.mtp.block(layers[-1])])])
  errors = []
  for kind in dict.fromkeys(block.attention for block in blocks):
    faults = []
    if isinstance(kind, SharesRows):
      faults = kind.check_shared(length // shards, order)
    elif not isinstance(order, Contiguous):
      faults = [
        f'does not say that it takes tokens in the order {type(order).__name__}; use Contiguous(), '
        'or give it `check_shared`'
      ]
    faults += apart_faults(kind, experiment, sizes)
    errors += [f'context_parallel: attention {type(kind).__name__}: {fault}' for fault in faults]
  if isinstance(model, DeepSeekV4):
    errors.append(
      f'rules.seq {experiment.rules.seq} has {shards} devices that share a row; a whole step of '
      'DeepSeekV4 was not found equal to that of one device there: let each have rows of its own'
    )
  for moe in dict.fromkeys(block.feed_forward for block in blocks):
    parts = (moe.router, moe.dispatch) if isinstance(moe, MoE) else ()
    errors += [
      f'context_parallel: {type(part).__name__} {fault}'
      for part in parts
      if isinstance(part, ExpertAttention | Capacity)
      for fault in in_order_only(order, 'the tokens of a row, one after the other,')
    ]
  return errors


def apart_faults(kind: Any, experiment: Experiment, sizes: dict[str, int]) -> list[str]:
  """Returns why a kind cannot have heads or layers apart where devices share a row, as messages.

  Kinds beside these three leave heads to the compiler, which ended the process when it was to
  partition `DSA` so, and so it did with `DSA` in stages; the others of them were not tried.
  """
  rules = experiment.rules
  if sizes['stage'] > 1 and not isinstance(kind, MLA | MHA):
    return [
      'lies in stages where devices share a row, which the compiler cannot partition for it; give '
      '`stage` or `seq` one device'
    ]
  spread = shard_count(rules.act_heads, sizes) > 1 or shard_count(rules.heads, sizes) > 1
  if not spread or isinstance(kind, MLA | MHA | Window):
    return []
  return [
    f'has heads on {rules.act_heads or rules.heads} where devices share a row, which the compiler '
    'cannot partition for it; give `model` one device'
  ]


def resolved(experiment: Experiment, precision: Precision) -> Experiment:
  """Puts a measured precision in the place of `Fastest`."""
  if isinstance(experiment.precision, Fastest):
    return dataclasses.replace(experiment, precision=precision)
  return experiment
