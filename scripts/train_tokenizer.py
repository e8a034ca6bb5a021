"""Trains the byte-level BPE that ships in the package on the training split of its corpus.

python scripts/train_tokenizer.py            write deepseek_jax/data/corpus/bpe_8192.json
python scripts/train_tokenizer.py --check    train again and compare with the file there
"""

import pathlib

import tokenizers
from absl import app, flags
from tokenizers import decoders, models, pre_tokenizers, trainers

from deepseek_jax.data.source import Embedded
from deepseek_jax.data.tokenizer import BPE_FILE, BPE_SPECIALS

_VOCAB_SIZE = flags.DEFINE_integer('vocab_size', 8192, 'Entries, the special tokens included.')
_OUTPUT = flags.DEFINE_string('output', str(BPE_FILE), 'Where the tokenizer is written.')
_CHECK = flags.DEFINE_bool('check', False, 'Compare with the file there; write nothing.')

# A word with the blank before it, a run of up to three digits, a run of signs, or blanks. Digits
# come in short runs so that a year is not one opaque token.
_WORDS = (
  r"'(?:[sdmt]|ll|ve|re)\b| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train(vocab_size: int) -> str:
  """Trains on the embedded training split; returns the tokenizer as JSON text."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior='isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(BPE_SPECIALS),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  texts = (document.text for document in Embedded().documents('train'))
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer.to_str(pretty=True) + '\n'


def main(argv: list[str]) -> None:
  """Trains, then writes or compares."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected argument {argv[1]!r}')
  path = pathlib.Path(_OUTPUT.value)
  serialised = train(_VOCAB_SIZE.value)
  if not _CHECK.value:
    path.write_text(serialised, encoding='utf-8')
    print(f'wrote {path} ({path.stat().st_size:,} bytes)')
  elif path.read_text(encoding='utf-8') != serialised:
    raise SystemExit(f'{path} differs from the tokenizer trained now')
  else:
    print(f'{path} is what training gives')


if __name__ == '__main__':
  app.run(main)
