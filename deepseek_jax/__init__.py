"""DeepSeek-style models in JAX: train, ablate, scale and serve them."""

__version__ = '0.1.0'
