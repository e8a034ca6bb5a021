"""The optimizers a run can choose from.

Every kind has `peak_lr` and `build(schedule_fn, axes)`; to log the learning rate of update `step`,
compute `optimizer.peak_lr * schedule_fn(step)`.
"""

from deepseek_jax.optim.adamw import AdamW
from deepseek_jax.optim.muon import Muon

Optimizer = AdamW | Muon

__all__ = ['AdamW', 'Muon', 'Optimizer']
