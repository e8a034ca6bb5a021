"""Text to batches: sources, tokenizers, packing, and the pipeline that yields one typed Batch."""

from deepseek_jax.data.batch import Batch
from deepseek_jax.data.document import Document
from deepseek_jax.data.packed_split import PackedSplit, heldout_batches
from deepseek_jax.data.pairs import Pairs
from deepseek_jax.data.pipeline import TextCorpus, TextData, train_batches
from deepseek_jax.data.source import Embedded, TextFiles
from deepseek_jax.data.tokenizer import BPE, Bytes, DeepSeekVocabulary, TokenizerFile

__all__ = [
  'BPE',
  'Batch',
  'Bytes',
  'DeepSeekVocabulary',
  'Document',
  'Embedded',
  'PackedSplit',
  'Pairs',
  'TextCorpus',
  'TextData',
  'TextFiles',
  'TokenizerFile',
  'heldout_batches',
  'train_batches',
]
