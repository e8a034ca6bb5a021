"""The allocator's settings, in a process of their own: they cannot be taken back."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource
import numpy as np
from deepseek_jax.core.allocator import keep_freed_memory

def faults():
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if {told}:
  assert keep_freed_memory()
for _ in range(2):
  np.ones(1 << 25)
before = faults()
for _ in range(4):
  np.ones(1 << 25)
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='only glibc is told')
def test_a_freed_block_is_used_again():
  """Blocks of 256 MB, six in a row: without the settings each one is faulted in anew."""
  faults = {}
  for told in (False, True):
    command = [sys.executable, '-c', SCRIPT.format(told=told)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    faults[told] = int(result.stdout)
  assert faults[True] < 200 < faults[False]
