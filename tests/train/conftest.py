"""Text to train on."""

import numpy as np
import pytest


@pytest.fixture(scope='session')
def text(tmp_path_factory) -> str:
  """A folder of small documents, as a glob."""
  folder = tmp_path_factory.mktemp('text')
  words = 'the ship and the sea and the whale of the north wind'.split()
  generator = np.random.default_rng(0)
  for number in range(40):
    (folder / f'{number}.txt').write_text(' '.join(generator.choice(words, 120)) + f' {number}\n')
  return f'{folder}/*.txt'
