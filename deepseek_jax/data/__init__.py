"""Text and pictures to batches: sources, tokenizers, packing, pipelines that yield one Batch."""

from deepseek_jax.data.batch import Batch
from deepseek_jax.data.captions import CaptionData, CaptionSplit, ImageCaptions
from deepseek_jax.data.document import Document
from deepseek_jax.data.drawing import OpenClipart
from deepseek_jax.data.packed_split import PackedSplit, heldout_batches
from deepseek_jax.data.pairs import Pairs
from deepseek_jax.data.pipeline import TextCorpus, TextData, train_batches
from deepseek_jax.data.recall import MultiQuery, Needle, Recall, RecallData, RecallSplit, Scattered
from deepseek_jax.data.source import Embedded, TextFiles
from deepseek_jax.data.tokenizer import BPE, Bytes, DeepSeekVocabulary, TokenizerFile

__all__ = [
  'BPE',
  'Batch',
  'Bytes',
  'CaptionData',
  'CaptionSplit',
  'DeepSeekVocabulary',
  'Document',
  'Embedded',
  'ImageCaptions',
  'MultiQuery',
  'Needle',
  'OpenClipart',
  'PackedSplit',
  'Pairs',
  'Recall',
  'RecallData',
  'RecallSplit',
  'Scattered',
  'TextCorpus',
  'TextData',
  'TextFiles',
  'TokenizerFile',
  'heldout_batches',
  'train_batches',
]
