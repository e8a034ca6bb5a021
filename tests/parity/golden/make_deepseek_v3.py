"""Writes the golden DeepSeek-V3 files beside this script: what the published PyTorch code answers.

Tiny random `DeepseekV3ForCausalLM` models (float32, eager attention) are run once, and their
weights, inputs, outputs, routing and gradients stored, so that the parity tests need no PyTorch.
A case is two compressed files, `<case>.npz` and `<case>_mtp.npz` (the weights of the layer of
multi-token prediction and every key starting with mtp/); B rows of T tokens, V vocabulary entries,
D width, K chosen of E experts, R rotary features a head:

  config                          JSON text in the layout of a published `config.json`
  tokens                          int32 [B, T]
  weights/<name>                  every weight under its published name; linear ones are [out, in]
  logits                          float32 [B, T, V]
  loss                            float32 [], mean cross-entropy in nats over the T-1 next tokens
  final_hidden                    float32 [B, T, D], after the last norm
  hidden/<i>                      float32 [B, T, D], residual stream after layer i, not normed
  routing/<i>/experts, /weights   int32 and float32 [B*T, K] of layer i, by rising expert number
  gradients/<name>                d loss / d weight
  rope/frequencies, rope/scale    float32 [R/2] radians per token; factor on the attention logits
  mtp/logits                      float32 [B, T-1, V]: entry t has read token t+1, predicts t+2
  mtp/hidden                      float32 [B, T-1, D], after shared_head.norm
  mtp/loss, mtp/gradients/<name>  as above, of the prediction layer alone; T-2 targets a row
  mtp/routing/experts, /weights   as above, [B*(T-1), K]

The layer of multi-token prediction is stored as layer N = num_hidden_layers, with its copies of the
embedding and the head. All weights are exact in float8 (e4m3), which keeps the files small.

Run, in an environment of its own: python make_deepseek_v3.py
Source: transformers 5.23.0, torch 2.13.0 (CPU); DeepSeek-V3 (arXiv 2412.19437) sections 2.1, 2.2.
"""

import json
import pathlib
import re

import numpy as np
import torch
import transformers
from torch.nn import functional
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

# Two implementations agree to about 1e-6: a choice of expert closer than this could go either way.
SMALLEST_ROUTING_MARGIN = 2e-4

SIZES = {
  'vocab_size': 96,
  'hidden_size': 48,
  'intermediate_size': 80,
  'moe_intermediate_size': 24,
  'num_attention_heads': 4,
  'num_key_value_heads': 4,
  'kv_lora_rank': 20,
  'qk_rope_head_dim': 8,
  'qk_nope_head_dim': 12,
  'v_head_dim': 10,
  'first_k_dense_replace': 1,
  'routed_scaling_factor': 2.5,
  'norm_topk_prob': True,
  'scoring_func': 'sigmoid',
  'topk_method': 'noaux_tc',
  'rms_norm_eps': 1e-6,
  'hidden_act': 'silu',
  'attention_bias': False,
  'tie_word_embeddings': False,
  'num_nextn_predict_layers': 1,
  'model_type': 'deepseek_v3',
}

# A short base and a short original length make all four frequencies matter within 37 tokens:
# the ramp between kept and stretched frequencies is 0, 1/3, 2/3, 1.
YARN = {
  'type': 'yarn',
  'factor': 40.0,
  'beta_fast': 32.0,
  'beta_slow': 1.0,
  'mscale': 1.0,
  'mscale_all_dim': 1.0,
  'original_max_position_embeddings': 64,
}

CASES = {
  'deepseek_v3_yarn_groups': {
    'seed': 3,
    'shape': (1, 37),
    'config': {
      'num_hidden_layers': 3,
      'q_lora_rank': 24,
      'n_routed_experts': 8,
      'n_shared_experts': 1,
      'n_group': 4,
      'topk_group': 2,
      'num_experts_per_tok': 2,
      'rope_theta': 100.0,
      'rope_scaling': YARN,
      'max_position_embeddings': 2560,
    },
  },
  'deepseek_v3_plain': {
    'seed': 5,
    'shape': (2, 7),
    'config': {
      'num_hidden_layers': 2,
      'q_lora_rank': None,
      'n_routed_experts': 6,
      'n_shared_experts': 2,
      'n_group': 1,
      'topk_group': 1,
      'num_experts_per_tok': 3,
      'rope_theta': 10000.0,
      'rope_scaling': None,
      'max_position_embeddings': 64,
    },
  },
}


def build(config: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
  """Returns the main model and its depth-1 multi-token-prediction model, both in float32."""
  published = {k: v for k, v in config.items() if k not in ('scoring_func', 'topk_method')}
  parsed = transformers.DeepseekV3Config(**published, attn_implementation='eager')
  assert parsed.rope_parameters['rope_theta'] == config['rope_theta']
  kind = 'yarn' if config['rope_scaling'] else 'default'
  assert parsed.rope_parameters['rope_type'] == kind
  model = v3.DeepseekV3ForCausalLM(parsed).float().eval()
  mtp = transformers.modeling_layers.MtpModel(model, 1).float().eval()
  # The plain loop over experts: the fused paths reorder sums.
  model.config._experts_implementation = mtp.config._experts_implementation = 'eager'
  return model, mtp


def fill(module: torch.nn.Module, rng: np.random.Generator) -> None:
  """Overwrites every weight and router bias with random values that are exact in float8 (e4m3)."""
  seen = list(module.named_parameters())
  seen += [(k, v) for k, v in module.named_buffers() if k.endswith('e_score_correction_bias')]
  for name, value in seen:
    draw = rng.standard_normal(tuple(value.shape))
    if name.endswith('e_score_correction_bias'):
      draw = 0.15 * draw
    elif value.ndim == 1:
      draw = 1 + 0.2 * draw
    elif not name.endswith('embed_tokens.weight'):
      draw = 1.3 * draw / np.sqrt(value.shape[-1])
    with torch.no_grad():
      value.copy_(torch.tensor(draw, dtype=torch.float32).to(torch.float8_e4m3fn).float())


def published_names(name: str, value: torch.Tensor) -> dict[str, np.ndarray]:
  """Splits a packed expert weight into one weight an expert; leaves every other as it is."""
  array = value.detach().numpy().astype(np.float32)
  head, _, last = name.rpartition('.')
  if last == 'gate_up_proj':
    gate, up = np.split(array, 2, axis=1)
    parts = {'gate_proj': gate, 'up_proj': up}
  elif last == 'down_proj':
    parts = {'down_proj': array}
  else:
    return {name: array}
  return {
    f'{head}.{expert}.{part}.weight': packed[expert]
    for part, packed in parts.items()
    for expert in range(len(packed))
  }


def mtp_name(name: str, layer: int) -> str:
  """Translates a name inside the prediction model to its published name, in layer `layer`."""
  name = re.sub(r'^layers\.0\.(mtp_block\.)?', f'model.layers.{layer}.', name)
  return name.replace('.post_norm.', '.shared_head.norm.')


def named_tensors(model, mtp) -> dict[str, torch.Tensor]:
  """Every weight and router bias under its published name, experts still packed."""
  layers = model.config.num_hidden_layers
  tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
  for name, value in [*mtp.named_parameters(), *mtp.named_buffers()]:
    # The rest of that model is the main one's embedding, head and rotary frequencies.
    if name.startswith('layers.'):
      tensors[mtp_name(name, layers)] = value
  return {name: value for name, value in tensors.items() if 'inv_freq' not in name}


class Recorder:
  """Keeps what each router of a model chose, and checks that no choice was close."""

  def __init__(self, module: torch.nn.Module):
    """Hooks every router in `module`."""
    self.choices = {}
    for name, router in module.named_modules():
      if isinstance(router, v3.DeepseekV3TopkRouter):
        router.register_forward_hook(self._hook(name))

  def _hook(self, name):
    def record(router, inputs, output):
      logits, weights, experts = output
      order = experts.argsort(dim=-1)
      layer = int(re.search(r'layers\.(\d+)\.', name).group(1))
      chosen = experts.gather(1, order)
      self.choices[layer] = (chosen, weights.gather(1, order))
      margin = routing_margin(router, logits.detach())
      assert margin > SMALLEST_ROUTING_MARGIN, f'layer {layer}: {margin} is too close a choice'
      print(f'  {name}: margin {margin:.5f}, loads {torch.bincount(chosen.ravel()).tolist()}')

    return record

  def arrays(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts int32 [N, K] and weights float32 [N, K] of one layer."""
    experts, weights = self.choices[layer]
    return experts.numpy().astype(np.int32), weights.detach().numpy()


def routing_margin(router, logits: torch.Tensor) -> float:
  """Smallest distance over tokens between the last group or expert chosen and the next one."""
  biased = logits.sigmoid() + router.e_score_correction_bias
  groups = biased.view(len(biased), router.num_group, -1)
  ranked = groups.topk(2, dim=-1)[0].sum(-1).sort(dim=-1, descending=True)
  margin = float('inf')
  if router.topk_group < router.num_group:
    gaps = ranked[0][:, router.topk_group - 1] - ranked[0][:, router.topk_group]
    margin = gaps.min().item()
  kept = ranked[1][:, : router.topk_group, None].expand(-1, -1, groups.shape[-1])
  experts = groups.gather(1, kept).flatten(1).sort(dim=-1, descending=True)[0]
  gaps = experts[:, router.top_k - 1] - experts[:, router.top_k]
  return min(margin, gaps.min().item())


def gradient_names(layer: int, config: dict) -> list[str]:
  """A handful of weights of one mixture-of-experts layer whose gradients pass every kind of op."""
  query = 'q_proj' if config['q_lora_rank'] is None else 'q_a_proj'
  prefix = f'model.layers.{layer}.'
  return [
    prefix + f'self_attn.{query}.weight',
    prefix + 'self_attn.kv_a_proj_with_mqa.weight',
    prefix + 'self_attn.kv_b_proj.weight',
    prefix + 'self_attn.kv_a_layernorm.weight',
    prefix + 'mlp.gate.weight',
    prefix + 'mlp.experts.down_proj',
    prefix + 'input_layernorm.weight',
    'model.embed_tokens.weight',
  ]


def gradients(loss: torch.Tensor, tensors: dict, names: list[str]) -> dict[str, np.ndarray]:
  """Returns d loss / d weight under published names; of packed experts, experts 0 and 1 only."""
  wanted = torch.autograd.grad(loss, [tensors[n] for n in names], retain_graph=True)
  found = {}
  for name, value in zip(names, wanted):
    assert value.abs().max() > 1e-6, name
    packed = name.endswith('experts.down_proj')
    found |= published_names(name, value[:2] if packed else value)
  return found


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
  """Mean cross-entropy in nats of logits [B, T, V] against targets [B, T]."""
  return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def run_mtp(model, mtp, tokens: torch.Tensor, hidden: torch.Tensor):
  """Depth-1 prediction; returns hidden states [B, T-1, D] after the norm, logits [B, T-1, V].

  Computed by the library's model and again from the formula of the paper, which must agree.
  """
  following, positions = tokens[:, 1:], torch.arange(1, tokens.shape[1])[None]
  states = mtp.forward_layer(0, hidden[:, :-1], positions, None, input_ids=following)

  layer, length = mtp.layers[0], following.shape[1]
  embedded = layer.enorm(model.model.embed_tokens(following))
  x = layer.eh_proj(torch.cat([embedded, layer.hnorm(hidden[:, :-1])], dim=-1))
  causal = torch.full((length, length), float('-inf')).triu(1)[None, None]
  x = layer.mtp_block(
    x,
    attention_mask=causal,
    # Positions of the tokens being predicted from: only differences of positions count.
    position_embeddings=model.model.rotary_emb(x, positions - 1),
  )
  torch.testing.assert_close(layer.post_norm(x), states, rtol=1e-4, atol=1e-5)
  return states, model.lm_head(states)


def make(case: dict) -> dict[str, np.ndarray]:
  """Runs one case and returns everything the module docstring lists, by key."""
  config = SIZES | case['config']
  rng = np.random.default_rng(case['seed'])
  model, mtp = build(config)
  fill(model, rng)
  fill(mtp.layers, rng)
  layers, dense = config['num_hidden_layers'], config['first_k_dense_replace']
  tensors, routing, mtp_routing = named_tensors(model, mtp), Recorder(model), Recorder(mtp)
  tokens = torch.tensor(rng.integers(0, config['vocab_size'], case['shape']))

  stream = {}
  for i, layer in enumerate(model.model.layers):
    layer.register_forward_hook(lambda m, a, out, i=i: stream.update({f'hidden/{i}': out.detach()}))
  hidden = model.model(tokens, use_cache=False).last_hidden_state
  logits = model.lm_head(hidden)
  loss = cross_entropy(logits[:, :-1], tokens[:, 1:])
  mtp_hidden, mtp_logits = run_mtp(model, mtp, tokens, hidden)
  mtp_loss = cross_entropy(mtp_logits[:, :-1], tokens[:, 2:])
  print(f'  loss {loss.item():.4f}, mtp loss {mtp_loss.item():.4f}, logit std {logits.std():.3f}')

  out = {'config': np.array(json.dumps(config, indent=2)), 'tokens': tokens.int().numpy()}
  for name, value in tensors.items():
    out |= {f'weights/{k}': v for k, v in published_names(name, value).items()}
  # The published files hold copies of the embedding and the head beside the extra layer.
  copies = {'embed_tokens': 'model.embed_tokens', 'shared_head.head': 'lm_head'}
  for name, source in copies.items():
    out[f'weights/model.layers.{layers}.{name}.weight'] = out[f'weights/{source}.weight']
  out |= {'logits': logits, 'loss': loss, 'final_hidden': hidden, **stream}
  for i in range(dense, layers):
    out[f'routing/{i}/experts'], out[f'routing/{i}/weights'] = routing.arrays(i)
  names = [*gradient_names(dense, config), 'model.norm.weight']
  out |= {f'gradients/{k}': v for k, v in gradients(loss, tensors, names).items()}
  out |= {'mtp/logits': mtp_logits, 'mtp/loss': mtp_loss, 'mtp/hidden': mtp_hidden}
  out['mtp/routing/experts'], out['mtp/routing/weights'] = mtp_routing.arrays(0)
  extra = ('eh_proj', 'enorm', 'hnorm', 'shared_head.norm')
  names = gradient_names(layers, config) + [f'model.layers.{layers}.{n}.weight' for n in extra]
  out |= {f'mtp/gradients/{k}': v for k, v in gradients(mtp_loss, tensors, names).items()}
  out['rope/frequencies'] = model.model.rotary_emb.inv_freq
  out['rope/scale'] = np.float32(model.model.layers[0].self_attn.scaling)
  return {k: v.detach().numpy() if torch.is_tensor(v) else v for k, v in out.items()}


def main() -> None:
  """Writes two files a case beside this script."""
  torch.set_num_threads(1)
  for name, case in CASES.items():
    print(name)
    arrays = make(case)
    extra = ('mtp/', f'weights/model.layers.{case["config"]["num_hidden_layers"]}.')
    for suffix, wanted in (('', False), ('_mtp', True)):
      path = pathlib.Path(__file__).with_name(f'{name}{suffix}.npz')
      part = {k: v for k, v in arrays.items() if k.startswith(extra) is wanted}
      np.savez_compressed(path, **part)
      print(f'  {path.name}: {len(part)} arrays, {path.stat().st_size} bytes')
      assert path.stat().st_size < 300_000


if __name__ == '__main__':
  main()
