"""The peer of `bench_train.py`: transformers' DeepSeek-V3 of the same sizes, trained by torch.

Runs in an environment of its own, with torch and transformers and nothing of this project. Reads
lines from standard input; each makes one training step, and its seconds are printed.

  PYTHON_WITH_TORCH scripts/bench_train_torch.py float32|bfloat16 grouped_mm|eager THREADS
"""

import resource
import sys
import time

START = time.perf_counter()


def main() -> None:
  """Trains step by step, as told."""
  import torch
  from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

  imported = time.perf_counter() - START
  precision, experts, threads = sys.argv[1:]
  torch.set_num_threads(int(threads))
  torch.manual_seed(0)
  config = DeepseekV3Config(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1408,
    moe_intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    n_shared_experts=1,
    n_routed_experts=32,
    routed_scaling_factor=2.5,
    kv_lora_rank=128,
    q_lora_rank=192,
    qk_rope_head_dim=32,
    v_head_dim=64,
    qk_nope_head_dim=64,
    n_group=1,
    topk_group=1,
    num_experts_per_tok=4,
    first_k_dense_replace=1,
    norm_topk_prob=True,
    tie_word_embeddings=False,
    attn_implementation='sdpa',
    experts_implementation=experts,
    use_cache=False,
  )
  model = DeepseekV3ForCausalLM(config)
  found = model.config._experts_implementation
  if found != experts:
    raise SystemExit(f'experts run as {found!r}, not as {experts!r}')
  optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)
  tokens = torch.randint(0, 8192, (8, 512))
  parameters = sum(weight.numel() for weight in model.parameters())
  print(f'ready {parameters} {imported}', flush=True)
  for line in sys.stdin:
    if line.strip() != 'step':
      break
    start = time.perf_counter()
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'):
      loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    value = loss.item()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f'step {time.perf_counter() - start} {value} {peak}', flush=True)


if __name__ == '__main__':
  main()
