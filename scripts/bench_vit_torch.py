"""The peer of `bench_vit.py`: transformers' SigLIP encoder of the same sizes, trained by torch.

Runs in an environment of its own, with torch and transformers and nothing of this project. Reads
lines from standard input; each makes one training step, and its seconds are printed.

  PYTHON_WITH_TORCH scripts/bench_vit_torch.py float32|bfloat16 SIZE PATCH WIDTH DEPTH BATCH THREADS
"""

import resource
import sys
import time

START = time.perf_counter()


def main() -> None:
  """Trains step by step, as told."""
  import torch
  from transformers import SiglipVisionConfig, SiglipVisionModel

  imported = time.perf_counter() - START
  precision = sys.argv[1]
  size, patch, width, depth, batch, threads = (int(word) for word in sys.argv[2:])
  torch.set_num_threads(threads)
  torch.manual_seed(0)
  config = SiglipVisionConfig(
    hidden_size=width,
    intermediate_size=4 * width,
    num_hidden_layers=depth,
    num_attention_heads=width // 64,
    image_size=size,
    patch_size=patch,
    vision_use_head=False,
    attn_implementation='sdpa',
  )
  model = SiglipVisionModel(config)
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
  pictures = torch.randint(0, 256, (batch, 3, size, size)).float() / 127.5 - 1
  goal = torch.sin(torch.arange(width).float())
  parameters = sum(weight.numel() for weight in model.parameters())
  print(f'ready {parameters} {imported}', flush=True)
  for line in sys.stdin:
    if line.strip() != 'step':
      break
    start = time.perf_counter()
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'):
      hidden = model(pixel_values=pictures).last_hidden_state
    loss = (hidden.float() - goal).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    value = loss.item()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f'step {time.perf_counter() - start} {value} {peak}', flush=True)


if __name__ == '__main__':
  main()
