"""Writes deepseek_v4_parts.npz beside this script: what the published PyTorch code answers.

One attention layer of each type and one site of hyper-connections with its head, of a tiny random
DeepSeek-V4 (float32, eager attention), so that the parity test needs no PyTorch. B rows of T
tokens, D width, R lanes; <type> is window, csa or hca:

  config                         JSON text, the arguments of `DeepseekV4Config`
  x                              float32 [B, T, D], given to every attention layer
  pull                           float32 [B, T, D], what gradients are taken of: Σ pull · output
  <type>/weights/<name>          every weight under its published name; linear ones are [out, in]
  <type>/output                  float32 [B, T, D]
  <type>/gradients/<name>        of the weights, `x` among them; none of the indexer, which has none
  csa/chosen                     bool [B, T, N], the entries that the indexer chose
  stream                         float32 [B, T, R, D]
  site/weights/<name>, head/weights/<name>
  site/output                    float32 [B, T, R, D] the stream after a sublayer that doubles
  site/gradients/stream          of Σ pull · each lane
  head/output                    float32 [B, T, D]

Weights that the code starts at 0 or 1 (sinks, position biases, scales, hyper-connections) are
random here, since they would hide errors.

Run, in an environment of its own: python make_deepseek_v4.py
Source: transformers 5.23.0, torch 2.13.0 (CPU); DeepSeek-V4 (arXiv 2606.19348), section 2.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

LENGTH, ROWS = 37, 1
SMALLEST_MARGIN = 1e-5
"""Two implementations agree to about 1e-6: a choice closer than this could go either way."""

CONFIG = {
  'vocab_size': 32,
  'hidden_size': 20,
  'moe_intermediate_size': 8,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'head_dim': 12,
  'partial_rotary_factor': 0.5,
  'q_lora_rank': 10,
  'o_groups': 2,
  'o_lora_rank': 7,
  'sliding_window': 5,
  'layer_types': [
    'sliding_attention',
    'compressed_sparse_attention',
    'heavily_compressed_attention',
  ],
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
  'index_head_dim': 8,
  'index_topk': 3,
  'hc_mult': 4,
  'n_routed_experts': 4,
  'num_experts_per_tok': 2,
}
TYPES = ('window', 'csa', 'hca')


def fill(module: torch.nn.Module, rng: np.random.Generator) -> None:
  """Overwrites every weight with random values, the square root of the fan-in smaller."""
  for name, value in module.named_parameters():
    draw = rng.standard_normal(tuple(value.shape))
    if name.endswith(('norm.weight', 'scale')):
      draw = 1 + 0.3 * draw
    elif value.ndim == 2 and not name.endswith('position_bias'):
      draw *= 1.3 / np.sqrt(value.shape[-1])
    with torch.no_grad():
      value.copy_(torch.tensor(draw, dtype=torch.float32))


def run_attention(config, index: int, x, pull, rng) -> dict[str, np.ndarray]:
  """Runs one attention layer forward and backward."""
  layer = v4.DeepseekV4Attention(config, index).float().eval()
  fill(layer, rng)
  positions = torch.arange(LENGTH)[None].expand(ROWS, -1)
  rotary = v4.DeepseekV4RotaryEmbedding(config)
  tables = {
    kind: rotary(x, position_ids=positions, layer_type=kind) for kind in ('main', 'compress')
  }
  distance = positions[:, :, None] - positions[:, None, :]
  hidden = (distance < 0) | (distance >= config.sliding_window)
  mask = torch.zeros(ROWS, 1, LENGTH, LENGTH).masked_fill(hidden[:, None], float('-inf'))
  found = {}
  if TYPES[index] == 'csa':

    def remember(module, inputs, scores):
      found['scores'] = scores.detach()

    def remember_chosen(module, inputs, chosen):
      found['chosen'] = chosen

    layer.compressor.indexer.scorer.register_forward_hook(remember)
    layer.compressor.indexer.register_forward_hook(remember_chosen)
  x = x.clone().requires_grad_()
  output, _ = layer(x, tables, positions, mask)
  torch.sum(output * pull).backward()
  kind = TYPES[index]
  result = {f'{kind}/output': output}
  if found:
    result['csa/chosen'] = check_margins(found, positions, config)
  for name, value in layer.named_parameters():
    result[f'{kind}/weights/{name}'] = value
    if 'indexer' not in name:
      result[f'{kind}/gradients/{name}'] = value.grad
  return result | {f'{kind}/gradients/x': x.grad}


def check_margins(found, positions, config):
  """Returns the chosen entries [B, T, N] bool, none of which was a close call."""
  scores, chosen = found['scores'], found['chosen']
  entries = scores.shape[-1]
  seen = torch.arange(entries) < ((positions + 1) // 4)[..., None]
  ranked = torch.sort(scores.masked_fill(~seen, float('-inf')), dim=-1, descending=True).values
  k = config.index_topk
  gap = (ranked[..., k - 1] - ranked[..., k])[seen.sum(-1) > k]
  assert gap.min() > SMALLEST_MARGIN, gap.min()
  picked = torch.zeros(*scores.shape[:2], entries + 1, dtype=torch.bool)
  picked.scatter_(2, torch.where(chosen < 0, entries, chosen), True)
  return picked[..., :entries]


def run_lanes(config, stream, pull, rng) -> dict[str, np.ndarray]:
  """Runs a site of hyper-connections around a sublayer that doubles, and the head."""
  site, head = v4.DeepseekV4HyperConnection(config), v4.DeepseekV4HyperHead(config)
  fill(site, rng)
  fill(head, rng)
  stream = stream.clone().requires_grad_()
  post, comb, collapsed = site(stream)
  mixed = torch.matmul(comb.transpose(-1, -2), stream)
  output = post.unsqueeze(-1) * (2 * collapsed).unsqueeze(-2) + mixed
  torch.sum(output * pull[:, :, None]).backward()
  result = {'site/output': output, 'site/gradients/stream': stream.grad}
  result['head/output'] = head(stream)
  for part, module in (('site', site), ('head', head)):
    for name, value in module.named_parameters():
      result[f'{part}/weights/{name}'] = value
  return result


def main() -> None:
  """Writes the file."""
  torch.manual_seed(0)
  rng = np.random.default_rng(11)
  config = transformers.DeepseekV4Config(**CONFIG, attn_implementation='eager')
  draw = lambda *shape: torch.tensor(rng.standard_normal(shape), dtype=torch.float32)  # noqa: E731
  x, pull = draw(ROWS, LENGTH, config.hidden_size), draw(ROWS, LENGTH, config.hidden_size)
  stream = draw(ROWS, LENGTH, config.hc_mult, config.hidden_size)
  arrays = {'x': x, 'pull': pull, 'stream': stream}
  for index in range(len(TYPES)):
    arrays |= run_attention(config, index, x, pull, rng)
  arrays |= run_lanes(config, stream, pull, rng)
  values = {name: value.detach().numpy() for name, value in arrays.items()}
  path = pathlib.Path(__file__).with_name('deepseek_v4_parts.npz')
  np.savez_compressed(path, config=json.dumps(CONFIG), **values)
  print(path.name, f'{path.stat().st_size:,} bytes')


if __name__ == '__main__':
  main()
