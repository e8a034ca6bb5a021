"""Several tokens a step, and the same tokens, or draws of the same distribution, as one a step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import linen as nn

from configs import tiny_mla, tiny_v4
from deepseek_jax.core.config import ConfigError
from deepseek_jax.core.override import override
from deepseek_jax.data.tokenizer import Bytes
from deepseek_jax.infer import draft as drafting
from deepseek_jax.infer.decode import PlacedModel, jit_full_logits
from deepseek_jax.infer.generate import TextGenerator, generate
from deepseek_jax.infer.sample import Greedy, Sample, Within
from deepseek_jax.infer.speculate import Acceptance, Speculate, SpeculativeStream, speculate
from deepseek_jax.layers.attention.latent import MLA
from deepseek_jax.layers.context import text_context
from deepseek_jax.layers.feed_forward import SwiGLU
from deepseek_jax.layers.moe.dispatch.all_to_all import AllToAll
from deepseek_jax.layers.moe.dispatch.capacity import Capacity
from deepseek_jax.layers.moe.router.balanced import Balanced
from deepseek_jax.models.deepseek_v3 import DeepSeekV3
from deepseek_jax.models.mtp import MTP
from deepseek_jax.ops import sampling

PROMPTS = [[0, 5, 6], [0], [0, 6, 6, 3, 1, 0, 2, 4, 1, 1]]
NEW, VOCAB = 13, 7
CYCLE = [3, 1, 4, 1, 5, 2, 6]


@pytest.fixture(scope='session')
def drafting_model(make_model, draw_variables):
  """Models with modules whose random drafts stand now and then."""

  def make(name):
    if name == 'v4':
      changes = {'vocab': VOCAB, 'depth': 3, 'first_layers': 1, 'mtp.depth': 2}
      changes |= {'hashed': None, 'hashed_layers': 0}
      named = {f'model.{name}': value for name, value in changes.items()}
      model = override(tiny_v4.get_config(), named)[0].model
      decoder = model.build()
      return decoder, draw_variables(decoder)
    kind, depth = name.split('-')
    return make_model(kind, vocab=VOCAB, mtp=MTP(depth=int(depth)))

  return make


def run(decoder, variables, prompts=PROMPTS, **options):
  """Returns the rows, and how drafts did."""
  stream = SpeculativeStream(decoder, variables, prompts, **{'max_new_tokens': NEW} | options)
  rows = [[] for _ in prompts]
  for row, token in stream:
    rows[row].append(token)
  return rows, stream.acceptance


NAMES = [
  *('mla-1', 'dsa-1'),
  *(pytest.param(name, marks=pytest.mark.slow) for name in ('mla-2', 'window-3', 'v4')),
]


@pytest.mark.parametrize('name', NAMES)
def test_greedy_gives_the_same_tokens(drafting_model, name):
  """Prompts of unequal lengths, one of a single token; most drafts are wrong, some stand."""
  decoder, variables = drafting_model(name)
  expected = generate(decoder, variables, PROMPTS, max_new_tokens=NEW)
  rows, acceptance = run(decoder, variables)
  assert rows == expected
  assert 0 < sum(acceptance.accepted) < acceptance.drafted
  assert acceptance.tokens == len(PROMPTS) * (NEW - 1)
  assert 1 < acceptance.tokens_per_step < 1 + len(acceptance.accepted)


@pytest.mark.parametrize('name', ['mla-2', pytest.param('v4', marks=pytest.mark.slow)])
def test_drafts_are_those_of_the_whole_forward_pass(drafting_model, name):
  """Whatever was drafted, fed and taken back before; prompts in chunks of three."""
  decoder, variables = drafting_model(name)
  model, lengths = PlacedModel(decoder, variables), np.array([len(p) for p in PROMPTS], np.int32)
  tokens = np.zeros((3, 32), np.int32)
  for row, prompt in enumerate(PROMPTS):
    tokens[row, : len(prompt)] = prompt
  reading = model.call(drafting.start_reading, 3, 32)
  for start in range(0, lengths.max(), 3):
    block, begin = tokens[:, start : start + 5], np.full(3, start, np.int32)
    counts = np.clip(lengths - start, 0, 3)
    reading = model.call(drafting.jit_read_chunk, reading, block, begin, counts, lengths)
  chosen = model.choose(Greedy(), reading.logits, 0, 0)
  progress = drafting.begin(reading, chosen, tokens, lengths, np.int32(NEW))
  soft, seed = Sample(), np.uint32(0)
  draft = jax.jit(drafting.draft, static_argnums=(0, 3))

  @jax.jit
  def every_depth(variables, tokens):
    context = text_context(tokens)
    method = lambda m: [m.logits(hidden, context) for hidden in m.every_depth(context)]  # noqa: E731
    return decoder.apply(variables, method=method)

  for _ in range(5):
    drafted, proposal = draft(decoder, variables, progress, soft, seed)
    whole = [jax.nn.softmax(x) for x in every_depth(variables, drafted.tokens)]
    for row, known in enumerate(np.asarray(progress.known)):
      for k in (1, 2):
        np.testing.assert_allclose(proposal[row, k - 1], whole[k][row, known - 2], atol=1e-5)
    progress, _, _ = model.call(drafting.jit_step, progress, soft, seed)
  assert np.ptp(np.asarray(progress.known) - lengths) > 0


@pytest.fixture(scope='module')
def trained():
  """A model that has learnt a cycle by heart, and what it says after one."""
  family = DeepSeekV3(
    depth=1,
    width=32,
    vocab=VOCAB,
    attention=MLA(heads=2, nope_dim=8, rope_dim=4, value_dim=8, latent=16),
    feed_forward=SwiGLU(hidden=32),
    dense=SwiGLU(hidden=32),
    mtp=MTP(depth=2),
  )
  decoder = family.build()
  tokens = jnp.asarray([CYCLE * 5])
  context, optimizer = text_context(tokens), optax.adam(1e-2)

  def loss(params):
    every = decoder.apply(
      {'params': params},
      method=lambda m: [m.logits(hidden, context) for hidden in m.every_depth(context)],
    )
    terms = [
      optax.softmax_cross_entropy_with_integer_labels(x[:, : -k - 1], tokens[:, k + 1 :]).mean()
      for k, x in enumerate(every)
    ]
    return sum(terms)

  @jax.jit
  def update(params, state):
    changes, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, changes), state

  init = jax.jit(lambda key: decoder.init(key, context, method='everything'))
  params = nn.meta.unbox(init(jax.random.key(0)))['params']
  state = optimizer.init(params)
  for _ in range(60):
    params, state = update(params, state)
  return decoder, {'params': params, 'buffers': {}}


def test_a_model_that_knows_what_comes(trained):
  """Nearly all drafts stand: close to three tokens a step, wherever in a step a row is full."""
  prompts = [CYCLE * 2, CYCLE[:4] + CYCLE[4:] + CYCLE[:3]]
  whole = generate(*trained, prompts, max_new_tokens=16)
  assert whole[0] == (CYCLE * 3)[:16]
  rows, acceptance = run(*trained, prompts, max_new_tokens=16)
  assert rows == whole
  assert acceptance.rate > 0.9
  assert acceptance.tokens_per_step > 2.7
  for count in (1, 2, 3, 4, 5):
    assert run(*trained, prompts, max_new_tokens=count)[0] == [row[:count] for row in whole]


def test_a_stop_token_among_accepted_drafts(trained):
  """Ends its row there; the other goes on; what was accepted beyond is dropped."""
  prompts = [CYCLE * 2, [1, 4, 1, 5, 2, 6, 3, 1]]
  for token in CYCLE:
    stop = frozenset({token})
    expected = generate(*trained, prompts, max_new_tokens=16, stop=stop)
    assert run(*trained, prompts, max_new_tokens=16, stop=stop)[0] == expected
  everything = frozenset(range(VOCAB))
  rows, acceptance = run(*trained, prompts, stop=everything)
  assert rows == [[], []]
  assert acceptance.steps == 0


def test_tokens_come_in_order(trained):
  """As a stream, a row's tokens of a step one after the other."""
  pairs = list(SpeculativeStream(*trained, [CYCLE * 2] * 2, max_new_tokens=7))
  assert [row for row, _ in pairs] == [0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize('sampler', [Greedy(), Sample()])
def test_neighbours_and_chunks_change_nothing(drafting_model, sampler):
  """A row depends on the seed and its number alone, however many drafts stand beside it."""
  model = drafting_model('mla-2')
  options = {'sampler': sampler, 'seed': 3}
  together, _ = run(*model, **options)
  assert run(*model, PROMPTS[:2], **options)[0] == together[:2]
  assert run(*model, PROMPTS, **options, prefill_chunk=3)[0] == together
  if sampler != Greedy():
    assert run(*model, sampler=sampler, seed=4)[0] != together


@pytest.fixture(scope='module')
def small(draw_variables):
  """Four tokens: every continuation can be counted."""
  family = DeepSeekV3(
    depth=1,
    width=8,
    vocab=4,
    attention=MLA(heads=1, nope_dim=4, rope_dim=2, value_dim=4, latent=6),
    feed_forward=SwiGLU(hidden=8),
    dense=SwiGLU(hidden=8),
    mtp=MTP(depth=2),
  )
  decoder = family.build()
  return decoder, draw_variables(decoder)


def chance(model, sampler, accepted_between=(0.2, 0.9)):
  """The p-value of the first four new tokens under their exact joint distribution."""
  decoder, variables = model
  prompt, count = [0, 3, 1], 8192
  texts = np.array(list(itertools.product(range(4), repeat=4)), np.int32)
  tokens = np.concatenate([np.broadcast_to(prompt, (256, 3)), texts], axis=1).astype(np.int32)
  logits = jit_full_logits(decoder, variables, tokens, np.full(256, 7, np.int32))[:, 2:6]
  single = np.asarray(sampler.probabilities(logits.reshape(-1, 4)), np.float64).reshape(256, 4, 4)
  exact = np.take_along_axis(single, texts[..., None], axis=-1)[..., 0].prod(axis=1)
  np.testing.assert_allclose(exact.sum(), 1, atol=1e-4)
  rows, acceptance = run(*model, [prompt] * count, max_new_tokens=4, sampler=sampler, seed=11)
  assert accepted_between[0] < acceptance.rate < accepted_between[1]
  numbers = np.array(rows) @ (4 ** np.arange(4)[::-1])
  found = np.bincount(numbers, minlength=256)
  assert not found[exact == 0].any()
  # Rare texts are counted together.
  rare = exact * count < 8
  expected = np.append(exact[~rare], exact[rare].sum()) * count
  observed = np.append(found[~rare], found[rare].sum())
  expected, observed = expected[expected > 0], observed[expected > 0]
  assert len(expected) > 20
  return scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue


@pytest.mark.parametrize(
  'sampler',
  [
    Sample(),
    Sample(temperature=0.7, top_k=3),
    Sample(temperature=1.5, top_p=0.9, min_p=0.05),
    Within(vocab=3, sampler=Sample()),
  ],
  ids=['plain', 'top_k', 'top_p', 'within'],
)
def test_draws_have_the_distribution_of_the_model(small, sampler):
  assert chance(small, sampler) > 1e-3


@pytest.mark.parametrize('fault', ['all stand', 'target in place of the rest'])
def test_the_distribution_shows_a_wrong_rule(small, monkeypatch, fault):
  """What the test above would say if drafts always stood, or if nothing were subtracted."""
  rule = sampling.accept_drafts

  def wrong(target, proposal, drafts, uniforms):
    count, _ = rule(target, proposal, drafts, uniforms)
    if fault == 'all stand':
      return jnp.full_like(count, drafts.shape[1]), target[:, -1]
    return count, jnp.take_along_axis(target, count[:, None, None], axis=1)[:, 0]

  monkeypatch.setattr(sampling, 'accept_drafts', wrong)
  # Samplers that keep everything, each by another name: the right rule is compiled for others.
  name = Sample(top_k=4 if fault == 'all stand' else 5)
  assert chance(small, name, (0, 1.01)) < 1e-9


def test_weights_on_a_mesh(drafting_model):
  """Over eight devices: the same tokens, and one compilation."""
  decoder, variables = drafting_model('mla-2')
  expected, _ = run(decoder, variables)
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ('data',))
  assert mesh.size == 8

  def spread(leaf):
    axis = 'data' if leaf.ndim and leaf.shape[0] % 8 == 0 else None
    spec = jax.sharding.PartitionSpec(*[axis][: leaf.ndim])
    return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

  sharded = jax.tree.map(spread, variables)
  before = drafting.jit_step._cache_size()
  assert run(decoder, sharded)[0] == expected
  assert drafting.jit_step._cache_size() == before + 1


def test_one_compilation_for_many_prompts(drafting_model):
  """Lengths within a bucket and seeds do not compile the model again."""
  model = drafting_model('mla-2')

  def sizes():
    return drafting.jit_step._cache_size(), drafting.jit_read_chunk._cache_size()

  run(*model, [[0] * 4], max_new_tokens=4, sampler=Sample())
  before = sizes()
  for length in (1, 7, 9):
    run(*model, [[0] * length], max_new_tokens=4, sampler=Sample(), seed=length)
  assert sizes() == before


def test_what_cannot_draft_is_refused(make_model, drafting_model):
  """Before anything runs, with the layers and their kind by name."""
  prompts = {'prompts': [[0]], 'max_new_tokens': 1}
  with pytest.raises(ConfigError, match=r'found `mtp` None, expected .* MTP\(depth=1\)'):
    speculate(*make_model(), **prompts)
  with pytest.raises(ConfigError, match='layer 0, layer 1, mtp 0: Recurrent cannot take tokens'):
    speculate(*make_model('recurrent', mtp=MTP()), **prompts)
  with pytest.raises(ConfigError) as caught:
    SpeculativeStream(*drafting_model('mla-2'), [[], [99]], max_new_tokens=0, seed=-1)
  assert len(caught.value.messages) == 4


@pytest.mark.parametrize(
  ('changes', 'what'),
  [
    ({'router': Balanced()}, 'router Balanced deals'),
    ({'dispatch': Capacity()}, 'dispatch Capacity drops'),
    ({'dispatch': AllToAll(bound=1.5)}, r'dispatch AllToAll\(bound=1.5\) drops'),
  ],
)
def test_what_looks_at_the_whole_batch_is_refused(changes, what):
  """A draft that does not stand would change what the tokens beside it get."""
  named = {f'model.feed_forward.{name}': value for name, value in changes.items()}
  decoder = override(tiny_mla.get_config(), named)[0].model.build()
  with pytest.raises(ConfigError, match=rf'layer 1.*mtp 0: {what}'):
    drafting.drafts_of(decoder)
  assert drafting.drafts_of(tiny_mla.get_config().model.build()) == 1


def test_counts_of_acceptance():
  """Rates are of the steps; a draft stands only with those before it."""
  nothing = Acceptance(steps=0, accepted=(0, 0), tokens=0)
  assert (nothing.rate, nothing.rates, nothing.tokens_per_step) == (0, (0, 0), 0)
  some = nothing.after(2, 3).after(1, 2).after(0, 1).after(2, 1)
  assert some == Acceptance(steps=4, accepted=(3, 2), tokens=7)
  assert (some.drafted, some.rate, some.rates) == (8, 5 / 8, (3 / 4, 1 / 2))
  assert some.tokens_per_step == 7 / 4


def test_text(make_model):
  """A generator of text drafts where it is told to, and gives the same text."""
  decoder, variables = make_model('window', vocab=264, mtp=MTP())
  parts = {'decoder': decoder, 'variables': variables, 'tokenizer': Bytes().build()}
  texts = ['To be', '']
  plain = TextGenerator(**parts).complete(texts, max_new_tokens=9)
  drafted = TextGenerator(**parts, decoding=Speculate(prefill_chunk=4))
  assert drafted.complete(texts, max_new_tokens=9) == plain
