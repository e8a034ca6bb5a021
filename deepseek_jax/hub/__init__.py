"""Trained models: weights in, logits and text out, one part changed, a few steps further."""

from deepseek_jax.hub.load import from_pretrained
from deepseek_jax.hub.pretrained import CACHE_DIR, Pretrained, transplant

__all__ = ['CACHE_DIR', 'Pretrained', 'from_pretrained', 'transplant']
