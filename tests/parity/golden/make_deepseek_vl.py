"""Writes `deepseek_vl.npz` beside this script: what the published PyTorch code answers.

A tiny random `DeepseekVLForConditionalGeneration` (float32, eager attention) is run once, and its
weights, inputs, outputs and gradients stored, so that the parity test needs no PyTorch. B rows of T
tokens, V vocabulary entries, S pixels a side, N patches, W and D channels of encoder and decoder:

  config              JSON text in the layout of a published `config.json`
  tokens              int32 [B, T]; the image token stands where a picture's embeddings go
  pictures            uint8 [B, S, S, 3]
  weights/<name>      every weight under its published name; linear ones are [out, in]
  vision              float32 [B, N, W], after the encoder's last norm
  aligned             float32 [B, N, D], after the aligner
  logits              float32 [B, T, V]
  loss                float32 [], mean cross-entropy in nats over the T-1 next tokens
  gradients/<name>    d loss / d weight

All weights are exact in float8 (e4m3), which keeps the file small.

Run, in an environment of its own: python make_deepseek_vl.py
Source: transformers 5.23.0, torch 2.13.0 (CPU); DeepSeek-VL (arXiv 2403.05525) section 3.1.
"""

import json
import pathlib

import numpy as np
import torch
import transformers
from torch.nn import functional

IMAGE = 60
CONFIG = {
  'model_type': 'deepseek_vl',
  'image_token_id': IMAGE,
  'tie_word_embeddings': False,
  'text_config': {
    'model_type': 'llama',
    'vocab_size': 64,
    'hidden_size': 32,
    'intermediate_size': 40,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'rms_norm_eps': 1e-6,
    'max_position_embeddings': 64,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': 100.0},
    'hidden_act': 'silu',
    'tie_word_embeddings': False,
  },
  'vision_config': {
    'model_type': 'siglip_vision_model',
    'hidden_size': 24,
    'intermediate_size': 28,
    'num_hidden_layers': 2,
    'num_attention_heads': 3,
    'image_size': 14,
    'patch_size': 4,
    'layer_norm_eps': 1e-6,
    'hidden_act': 'gelu_pytorch_tanh',
    'vision_use_head': False,
  },
}


def main() -> None:
  """Makes the model, runs it forward and backward, and writes the file."""
  torch.manual_seed(1)
  parsed = transformers.DeepseekVLConfig(**CONFIG, attn_implementation='eager')
  model = transformers.DeepseekVLForConditionalGeneration(parsed)
  with torch.no_grad():
    for name, weight in model.named_parameters():
      draw = torch.randn_like(weight)
      if weight.ndim > 1:
        fan_in = weight[0].numel() if 'embed' not in name or 'patch' in name else 4
        draw = draw / fan_in**0.5
      else:
        draw = 0.2 * draw + (1.0 if name.endswith('norm.weight') or 'norm1.w' in name else 0.0)
      weight.copy_(draw.to(torch.float8_e4m3fn).float())
  rng = np.random.default_rng(2)
  side = CONFIG['vision_config']['image_size'] // CONFIG['vision_config']['patch_size']
  tokens = rng.integers(0, 60, (2, 17))
  for row, begin in ((0, 2), (1, 6)):
    tokens[row, begin : begin + side**2] = IMAGE
  size = CONFIG['vision_config']['image_size']
  pictures = rng.integers(0, 256, (2, size, size, 3)).astype(np.uint8)
  pixels = torch.tensor(pictures.transpose(0, 3, 1, 2) / 127.5 - 1, dtype=torch.float32)
  ids = torch.tensor(tokens)
  features = model.model.get_image_features(pixels)
  logits = model(input_ids=ids, pixel_values=pixels).logits
  loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
  loss.backward()
  arrays = {
    'config': np.array(json.dumps(CONFIG)),
    'tokens': tokens.astype(np.int32),
    'pictures': pictures,
    'vision': features.last_hidden_state.detach().numpy(),
    'aligned': features.pooler_output.detach().numpy(),
    'logits': logits.detach().numpy(),
    'loss': loss.detach().numpy(),
  }
  for name, weight in model.named_parameters():
    arrays[f'weights/{name}'] = weight.detach().numpy()
    arrays[f'gradients/{name}'] = weight.grad.numpy()
    print(name, tuple(weight.shape), float(weight.grad.abs().max()))
  np.savez_compressed(pathlib.Path(__file__).parent / 'deepseek_vl.npz', **arrays)


if __name__ == '__main__':
  main()
