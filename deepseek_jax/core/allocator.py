"""The C library's memory allocator, told to suit a training step.

XLA allocates the temporaries of a program anew at every run, as one block of gigabytes. On a CPU
the C library asks the operating system for such a block and gives it back afterwards, so that every
step pays for a million page faults: a third of the time of a step of 100 million parameters.
"""

import ctypes
import sys

# Numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
  """Makes the process keep the memory it frees, for the next step to use again.

  Call it before anything big is allocated and before other threads run: blocks that are there
  already stay what they are. The process then never becomes smaller than it was at its largest.

  Returns:
    Whether the C library was told; False where it is not glibc, and nothing is changed.
  """
  if not sys.platform.startswith('linux'):
    return False
  library = ctypes.CDLL(None)
  if not hasattr(library, 'gnu_get_libc_version'):
    return False
  # One heap for all threads, which grows as a whole, is never trimmed, and serves blocks of any
  # size: a block of its own (`mmap`) would be given back when it is freed.
  settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
  return all(library.mallopt(name, value) == 1 for name, value in settings)
