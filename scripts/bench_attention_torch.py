"""Times torch's scaled_dot_product_attention for bench_attention.py, in torch's own interpreter.

Reads one command a line: `make B T H K V dtype`, then any number of `forward` and `backward`, which
are answered with the seconds taken.
"""

import os
import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention


def main() -> None:
  """Obeys the commands."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  arrays: list[torch.Tensor] = []
  for line in sys.stdin:
    word, *rest = line.split()
    begin = time.perf_counter()
    if word == 'make':
      *sizes, dtype = rest
      arrays = make([int(size) for size in sizes], getattr(torch, dtype))
    elif word == 'forward':
      with torch.no_grad():
        scaled_dot_product_attention(*arrays[:3], is_causal=True)
    else:
      out = scaled_dot_product_attention(*arrays[:3], is_causal=True)
      torch.autograd.grad(out, arrays[:3], arrays[3])
    print('seconds', time.perf_counter() - begin, flush=True)


def make(sizes: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
  """Returns queries, keys and values [B, H, T, K], and the output's gradient.

  Values are padded to the width of keys: of other widths torch would hold every score.
  """
  batch, length, heads, key, value = sizes
  draw = lambda dim: torch.randn(batch, heads, length, dim, dtype=dtype)  # noqa: E731
  pad = lambda x: torch.nn.functional.pad(x, (0, key - value))  # noqa: E731
  arrays = [draw(key), draw(key), pad(draw(value))]
  return [*(x.requires_grad_() for x in arrays), pad(draw(value))]


if __name__ == '__main__':
  main()
