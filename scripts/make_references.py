"""Writes tests/parity/references: tiny models of transformers, and what they answer.

A reference is a folder that `save_pretrained` wrote (random weights, float32), as a person has it
who trained or changed a model with transformers, and one file of ours beside it, so that tests need
no PyTorch. B rows of T tokens, V vocabulary entries:

  <case>/config.json, generation_config.json, model.safetensors   as transformers writes them
  <case>/answers.npz:
    tokens/<T>          int32 [B, T], for every length T of `ROWS`
    logits/<T>          float32 [B, T, V]
    loss/<T>            float32 [], mean cross-entropy in nats of B (T - 1) next tokens
    gradients/<name>    d loss/37 / d weight under its name in model.safetensors; the indexers have
                        none, since nothing teaches them outside of a training of their own
    prompts/<i>         int32 [P], a prompt for greedy decoding
    greedy/<i>          int32 [NEW_TOKENS], its continuation; no token ends it

Nothing is at its initial value: biases, sinks, norms, position biases, hyper-connections and tables
of experts are random, since their initial values of 0 and 1 would hide errors. All weights are
exact in float8 (e4m3).

Another implementation can only agree if no choice was close. Seeds are tried, from that of the case
on, until in all that is run each choice of experts, groups and tokens is clear by `SMALLEST_MARGIN`
of the largest score, and every greedy token by `SMALLEST_LEAD`; every weight has to have a gradient
too. What is written was checked: the fields of `matters` do change logits, eval and training give
the same gradients, decoding with a cache the same tokens as without, and the folder loads with no
key missing or left over to the same bits.

Run, in an environment of its own (pip install torch==2.13.0 transformers==5.23.0):
  python scripts/make_references.py [--out=tests/parity/references] [--case=v3]
Source: transformers 5.23.0, torch 2.13.0 (CPU).
"""

import argparse
import pathlib
import tempfile
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional
from torch.overrides import TorchFunctionMode

VERSIONS = {transformers: '5.23.0', torch: '2.13.0'}
ROWS = {7: 2, 37: 1, 45: 1}
"""Rows B of each length T: none is a multiple of a block of compressed tokens."""
GRADIENT_LENGTH = 37
PROMPT_LENGTHS = (1, 6, 19, 33)
NEW_TOKENS = 12
SMALLEST_MARGIN = 1e-4
SMALLEST_LEAD = 1e-3
"""In logits, which are of size 1. Two implementations agree to about 1e-6."""
SMALLEST_CHANGE = 1e-2
HIDDEN = -1e30
"""Scores below are of what may not be chosen."""

LATENT = {
  'vocab_size': 96,
  'hidden_size': 48,
  'intermediate_size': 64,
  'moe_intermediate_size': 8,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 4,
  'kv_lora_rank': 20,
  'q_lora_rank': 24,
  'qk_rope_head_dim': 8,
  'qk_nope_head_dim': 12,
  'v_head_dim': 10,
  'first_k_dense_replace': 1,
  'n_routed_experts': 12,
  'num_experts_per_tok': 3,
  'rope_theta': 100.0,
  'max_position_embeddings': 2560,
}
# All frequencies matter within 45 tokens: the ramp from kept to stretched is 0, 1/3, 2/3, 1.
YARN = {
  'type': 'yarn',
  'factor': 40.0,
  'beta_fast': 32.0,
  'beta_slow': 1.0,
  'original_max_position_embeddings': 64,
}
V2_YARN = {**YARN, 'mscale': 0.707, 'mscale_all_dim': 0.707}
V3_YARN = {**YARN, 'mscale': 1.0, 'mscale_all_dim': 1.0}
V3 = {
  **LATENT,
  'n_shared_experts': 1,
  'n_group': 3,
  'topk_group': 2,
  'routed_scaling_factor': 2.5,
  'rope_scaling': V3_YARN,
}

CASES: dict[str, dict[str, Any]] = {
  'v2_lite': {
    'seed': 4,
    'class': 'DeepseekV2',
    'matters': {'rope_scaling': None},
    'config': {
      **LATENT,
      'q_lora_rank': None,
      'n_routed_experts': 8,
      'moe_intermediate_size': 12,
      'n_shared_experts': 2,
      'topk_method': 'greedy',
      'n_group': 1,
      'topk_group': 1,
      'rope_scaling': V2_YARN,
    },
  },
  'v2': {
    'seed': 0,
    'class': 'DeepseekV2',
    'matters': {'topk_group': 3, 'routed_scaling_factor': 1.0},
    'config': {
      **LATENT,
      'n_shared_experts': 2,
      'topk_method': 'group_limited_greedy',
      'n_group': 4,
      'topk_group': 2,
      'routed_scaling_factor': 4.0,
      'rope_scaling': V2_YARN,
    },
  },
  'v3': {
    'seed': 3,
    'class': 'DeepseekV3',
    'matters': {'topk_group': 3, 'rope_scaling': None},
    'config': V3,
  },
  'v3_2': {
    'seed': 4,
    'class': 'DeepseekV32',
    'matters': {'index_topk': 9},
    # With few index heads every ReLU is 0 for some pairs, and ties are broken by anybody's order.
    'config': {**V3, 'index_n_heads': 16, 'index_head_dim': 12, 'index_topk': 8},
  },
  'v4': {
    'seed': 0,
    'class': 'DeepseekV4',
    'matters': {'swiglu_limit': 0.4, 'index_topk': 4, 'sliding_window': 7, 'hc_sinkhorn_iters': 2},
    'config': {
      'vocab_size': 96,
      'hidden_size': 32,
      'moe_intermediate_size': 8,
      'num_hidden_layers': 4,
      'num_attention_heads': 4,
      'head_dim': 16,
      'partial_rotary_factor': 0.5,
      'q_lora_rank': 20,
      'o_groups': 2,
      'o_lora_rank': 8,
      'sliding_window': 6,
      'layer_types': [
        'sliding_attention',
        'compressed_sparse_attention',
        'heavily_compressed_attention',
        'compressed_sparse_attention',
      ],
      'mlp_layer_types': ['hash_moe', 'moe', 'moe', 'moe'],
      'compress_rates': {'compressed_sparse_attention': 4, 'heavily_compressed_attention': 8},
      'rope_theta': 100.0,
      'compress_rope_theta': 400.0,
      'rope_parameters': {
        'rope_type': 'yarn',
        'factor': 16.0,
        'beta_fast': 4.0,
        'beta_slow': 1.0,
        'original_max_position_embeddings': 64,
      },
      'max_position_embeddings': 1024,
      'index_n_heads': 16,
      'index_head_dim': 12,
      'index_topk': 3,
      'n_routed_experts': 6,
      'num_experts_per_tok': 2,
      # Random weights never reach the released limit of 10.
      'swiglu_limit': 0.3,
    },
  },
}


class CloseCallError(Exception):
  """A seed with which two right implementations may differ."""


class Choices(TorchFunctionMode):
  """Watches every `topk` under it: all choices of the published models go through it."""

  def __torch_function__(self, func, types, args=(), kwargs=None):
    """Calls the function."""
    kwargs = kwargs or {}
    if func in (torch.topk, torch.Tensor.topk):
      scores, *rest = args
      assert kwargs.get('dim', -1) == -1
      self._look(scores.detach(), kwargs['k'] if 'k' in kwargs else rest[0])
    return func(*args, **kwargs)

  def _look(self, scores: torch.Tensor, k: int) -> None:
    """Refuses close calls between the last one chosen of scores [..., N] and the next one."""
    if k >= scores.shape[-1]:
      return
    ranked = scores.topk(k + 1, dim=-1).values
    largest = scores.masked_fill(scores < HIDDEN, 0).abs().amax(-1)
    gaps = (ranked[..., k - 1] - ranked[..., k]) / largest
    gaps = gaps[ranked[..., k] > HIDDEN]
    if gaps.numel() and not gaps.min() > SMALLEST_MARGIN:
      raise CloseCallError(f'choice of {k}: {gaps.min():.1e} of the largest score')


def build(case: dict) -> transformers.PreTrainedModel:
  """Returns the model of a case in float32, with what transformers begins with."""
  kind = getattr(transformers, f'{case["class"]}Config')
  config = kind(**case['config'], attn_implementation='eager')
  model = getattr(transformers, f'{case["class"]}ForCausalLM')(config).float().eval()
  # The plain loop over experts: the fused paths reorder sums.
  model.config._experts_implementation = 'eager'
  return model


def fill(model: transformers.PreTrainedModel, rng: np.random.Generator) -> None:
  """Overwrites every parameter and every stored buffer with random values."""
  saved = model.state_dict()
  for name, value in [*model.named_parameters(), *model.named_buffers()]:
    if name not in saved:
      continue
    if name.endswith('tid2eid'):
      rows = np.tile(np.arange(model.config.n_routed_experts), (len(value), 1))
      value.copy_(torch.tensor(rng.permuted(rows, axis=1)[:, : value.shape[1]]))
      continue
    draw = rng.standard_normal(tuple(value.shape))
    if name.endswith('e_score_correction_bias'):
      draw *= 0.15
    elif name.endswith(('norm.weight', 'scale')):
      draw = 1 + 0.2 * draw
    elif name.endswith('norm.bias'):
      draw *= 0.3
    elif value.ndim > 1 and not name.endswith(('embed_tokens.weight', 'position_bias')):
      draw *= 1.3 / np.sqrt(value.shape[-1])
    with torch.no_grad():
      value.copy_(torch.tensor(draw, dtype=torch.float32).to(torch.float8_e4m3fn).float())


def read(model, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  """Returns logits [B, T, V] and the mean loss of the next tokens of [B, T]."""
  answer = model(tokens, labels=tokens, use_cache=False)
  targets, guesses = tokens[:, 1:].flatten(), answer.logits[:, :-1].flatten(0, 1)
  torch.testing.assert_close(answer.loss, functional.cross_entropy(guesses, targets))
  return answer.logits, answer.loss


def gradients(model, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
  """Returns the gradients of the loss under the names of the model's parameters."""
  found: list[dict[str, torch.Tensor]] = []
  for mode in (model.train, model.eval):
    mode()
    model.zero_grad()
    read(model, tokens)[1].backward()
    values = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found.append(values)
  training, evaluation = found
  assert training.keys() == evaluation.keys()
  assert all(torch.equal(training[name], evaluation[name]) for name in training)
  without = {name for name, _ in model.named_parameters()} - evaluation.keys()
  assert all('indexer' in name for name in without), without
  for name, value in evaluation.items():
    rows = value.flatten(1) if 'experts' in name and value.ndim == 3 else value[None].flatten(1)
    if rows.abs().amax(1).min() < 1e-6:
      raise CloseCallError(f'{name} has no gradient')
  return evaluation


def as_saved(model, values: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
  """Returns tensors in the layout, and under the names, that `save_pretrained` gives them."""
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder, state_dict=dict(values))
    saved = load_file(pathlib.Path(folder) / 'model.safetensors')
  return {name: value.numpy() for name, value in saved.items()}


def continued(model, prompt: torch.Tensor) -> torch.Tensor:
  """Returns the greedy continuation [NEW_TOKENS] of [P], the same with a cache and without."""
  tokens = prompt[None]
  for _ in range(NEW_TOKENS):
    logits = model(tokens, use_cache=False).logits[0, -1]
    best = logits.topk(2).values
    if not best[0] - best[1] > SMALLEST_LEAD:
      raise CloseCallError(f'token {tokens.shape[1]}: {best[0] - best[1]:.1e} ahead')
    tokens = torch.cat([tokens, logits.argmax()[None, None]], dim=1)
  with_cache = model.generate(
    prompt[None],
    attention_mask=torch.ones_like(prompt[None]),
    max_new_tokens=NEW_TOKENS,
    do_sample=False,
    use_cache=True,
  )
  assert torch.equal(with_cache, tokens), (with_cache, tokens)
  return tokens[0, len(prompt) :]


def answer(model, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Runs a model and returns what the module's docstring lists."""
  size = model.config.vocab_size
  draw = lambda *shape: torch.tensor(rng.integers(0, size, shape))  # noqa: E731
  texts = {length: draw(rows, length) for length, rows in ROWS.items()}
  prompts = [draw(length) for length in PROMPT_LENGTHS]
  found: dict[str, torch.Tensor] = {}
  with Choices():
    with torch.no_grad():
      for length, tokens in texts.items():
        logits, loss = read(model, tokens)
        found |= {f'tokens/{length}': tokens.int(), f'logits/{length}': logits}
        found[f'loss/{length}'] = loss
      for place, prompt in enumerate(prompts):
        found[f'prompts/{place}'] = prompt.int()
        found[f'greedy/{place}'] = continued(model, prompt).int()
    slopes = gradients(model, texts[GRADIENT_LENGTH])
  saved, named = as_saved(model, slopes), dict(model.named_parameters())
  # Under other names and in other pieces they are still the gradients of the same weights.
  weights = as_saved(model, model.state_dict())
  inside = sum(float((named[name].detach() * slope).sum()) for name, slope in slopes.items())
  outside = sum(float((weights[name] * slope).sum()) for name, slope in saved.items())
  np.testing.assert_allclose(outside, inside, rtol=1e-4)
  arrays = {name: value.detach().numpy() for name, value in found.items()}
  return arrays | {f'gradients/{name}': slope for name, slope in saved.items()}


def check_what_matters(case: dict, model, arrays: dict[str, np.ndarray]) -> None:
  """Refuses a model that answers the same with other values of the fields it is there for."""
  tokens = torch.tensor(arrays['tokens/45'].astype(np.int64))
  for field, value in case['matters'].items():
    other = build({**case, 'config': {**case['config'], field: value}})
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
      change = np.abs(other(tokens).logits.numpy() - arrays['logits/45']).max()
    print(f'  with {field} {value}: logits change by {change:.3f}')
    assert change > SMALLEST_CHANGE, field


def write(folder: pathlib.Path, model, arrays: dict[str, np.ndarray]) -> None:
  """Writes a case, and reads it back."""
  model.save_pretrained(folder)
  np.savez_compressed(folder / 'answers.npz', **arrays)  # type: ignore[arg-type]
  again, info = transformers.AutoModelForCausalLM.from_pretrained(
    folder, output_loading_info=True, attn_implementation='eager'
  )
  assert not any(info.values()), info
  again.config._experts_implementation = 'eager'
  with torch.no_grad():
    for length in ROWS:
      logits = again(torch.tensor(arrays[f'tokens/{length}'].astype(np.int64))).logits
      assert np.array_equal(logits.numpy(), arrays[f'logits/{length}'])
  sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
  print(f'  {sum(sizes.values()):,} bytes', sizes)


def make(name: str, out: pathlib.Path) -> None:
  """Makes a case with the first seed that has no close call."""
  case = CASES[name]
  seed = case['seed']
  while True:
    rng = np.random.default_rng(seed)
    model = build(case)
    fill(model, rng)
    # So that nothing ends a continuation; what is written keeps it.
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
      arrays = answer(model, rng)
      break
    except CloseCallError as error:
      print(f'  {name}: seed {seed}: {error}', flush=True)
    seed += 1
  model.generation_config.eos_token_id = ends
  print(f'{name}: seed {seed}, losses {[float(arrays[f"loss/{length}"]) for length in ROWS]}')
  check_what_matters(case, model, arrays)
  write(out / name, model, arrays)


def main() -> None:
  """Writes one case or all."""
  for module, version in VERSIONS.items():
    assert module.__version__.split('+')[0] == version, f'{module.__name__} {module.__version__}'
  root = pathlib.Path(__file__).resolve().parents[1]
  parser = argparse.ArgumentParser(description=str(__doc__).split('\n')[0])
  parser.add_argument('--out', type=pathlib.Path, default=root / 'tests' / 'parity' / 'references')
  parser.add_argument('--case', choices=CASES, action='append', help='all unless given')
  arguments = parser.parse_args()
  torch.set_num_threads(1)
  torch.manual_seed(0)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  for name in arguments.case or CASES:
    make(name, arguments.out)


if __name__ == '__main__':
  main()
