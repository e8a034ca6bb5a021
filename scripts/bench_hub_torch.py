"""The peer of `bench_hub.py`: transformers reads the same folder and continues the same prompts.

Runs in an environment of its own, with torch and transformers and nothing of this project. Reads
one JSON object a line from standard input, and answers each with another:

  PYTHON_WITH_TORCH scripts/bench_hub_torch.py FOLDER float32|bfloat16 grouped_mm|eager THREADS
  {"batch": 8, "context": 128, "steps": 16}
  -> {"prefill": seconds of the prompts, "decode": seconds of a step, median}
"""

import json
import pathlib
import statistics
import sys
import time


def main() -> None:
  """Answers until there are no more lines."""
  import torch
  from transformers import AutoModelForCausalLM, DynamicCache

  folder, dtype, experts, threads = sys.argv[1:]
  torch.set_num_threads(int(threads))
  config = json.loads(pathlib.Path(folder, 'config.json').read_text(encoding='utf-8'))
  v4 = config['model_type'] == 'deepseek_v4'
  model, info = AutoModelForCausalLM.from_pretrained(
    folder,
    dtype=getattr(torch, dtype),
    attn_implementation='eager' if v4 else 'sdpa',
    experts_implementation=experts,
    output_loading_info=True,
  )
  wrong = {name: sorted(keys)[:3] for name, keys in info.items() if keys}
  if wrong:
    raise SystemExit(f'{folder}: {wrong}')
  model.eval()
  print(json.dumps({'parameters': sum(p.numel() for p in model.parameters())}), flush=True)
  for line in sys.stdin:
    asked = json.loads(line)
    batch, context, steps = asked['batch'], asked['context'], asked['steps']
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config['vocab_size'], (batch, context), generator=generator)
    with torch.inference_mode():
      cache = DynamicCache(config=model.config)
      start = time.perf_counter()
      out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
      token = out.logits[:, -1].argmax(-1, keepdim=True)
      prefill = time.perf_counter() - start
      times = []
      for _ in range(steps):
        start = time.perf_counter()
        out = model(token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        times.append(time.perf_counter() - start)
    print(json.dumps({'prefill': prefill, 'decode': statistics.median(times)}), flush=True)


if __name__ == '__main__':
  main()
