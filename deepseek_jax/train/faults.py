"""The host's side of the guard: what is skipped is written out; too much of it ends the run."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from deepseek_jax.core.config import ConfigError
from deepseek_jax.data.batch import Rows
from deepseek_jax.models.plan import Segment
from deepseek_jax.train.display import Display
from deepseek_jax.train.expert_log import ExpertLog
from deepseek_jax.train.guard import KINDS, NONFINITE_GRADIENT, NONFINITE_LOSS, OVERFLOW
from deepseek_jax.train.metrics import JsonLines

_SHOWN_TITLES = 3


class SkippedStepsError(ConfigError):
  """Too many steps in a row were skipped; what was trained before them is saved."""


class NoExpertsError(ConfigError):
  """Every expert of a layer is out of use; there is none to make another of."""


class FaultLog:
  """Reads of every finished step whether it was skipped; writes `faults.jsonl`.

  Attributes:
    rows: the file, one JSON object a skipped step.
    stop_after: skipped steps in a row that are too many, or None.
    exhausted: whether the run is to stop: at some step there were `stop_after` in a row, or a layer
      had no expert left.
    last: message of the newest fault, or None.
  """

  def __init__(
    self,
    rows: JsonLines,
    split: Rows,
    display: Display,
    stop_after: int | None,
    segments: tuple[Segment, ...],
    gather: Callable[[np.ndarray], Sequence[np.ndarray]] = lambda own: (own,),
  ):
    """Remembers where to write.

    Args:
      rows: the file.
      split: the training text, which knows the documents' names.
      display: shows a line for each fault.
      stop_after: skipped steps in a row that are too many, or None.
      segments: the plan of the stack, which knows the layers of experts.
      gather: from what one process has read, int32 [n], to what each has read.
    """
    self.rows, self.stop_after = rows, stop_after
    self._split, self._display, self._gather = split, display, gather
    self._experts = ExpertLog(rows, display, segments)
    self.exhausted = False
    self.last: str | None = None

  def read(self, step: int, metrics: dict[str, Any], documents: np.ndarray) -> None:
    """Takes `guard` out of a finished step's metrics, and writes a row if it was skipped.

    One scalar of a step that is done comes to the host; the rest only after a fault.

    Args:
      step: the number of the step.
      metrics: what the step returned.
      documents: [B, T] int32 document of every token that this process has read; -1 is padding.
    """
    self._experts.read(step, metrics)
    self.exhausted |= self._experts.exhausted
    report = metrics.pop('guard', None)
    if report is None or not (fault := int(report['fault'])):
      return
    figures = ('loss', 'grad_norm', 'loss_scale')
    values = {name: float(metrics[name]) for name in figures if name in metrics}
    report = jax.device_get(report)
    self.exhausted |= self.stop_after is not None and report['in_a_row'] >= self.stop_after
    self.last = describe(fault, values, report['bounds'])
    ids = sorted({int(n) for own in self._gather(np.unique(documents)) for n in own if n >= 0})
    titles = [self._split.titles[number] for number in ids]
    row = {'step': step, 'kind': KINDS[fault], 'message': self.last, **values}
    self.rows.append({**row, 'documents': ids, 'titles': titles})
    shown = ', '.join(titles[:_SHOWN_TITLES]) + (' …' if len(titles) > _SHOWN_TITLES else '')
    self._display.message(f'step {step} skipped: {self.last} (documents: {shown})')

  def error(self, saved: int) -> ConfigError:
    """Returns the error that ends the run.

    Args:
      saved: the step whose checkpoint was written.
    """
    if self._experts.exhausted:
      return NoExpertsError(
        [
          f'stopped: a layer has no expert in use any more; the newest: {self._experts.last}',
          f'step {saved} is saved; no weights of the layer are left to go on with: begin again at '
          'an earlier step, with a lower optimizer.peak_lr if it diverged',
          f'{self.rows.path} names every expert that was opened',
        ]
      )
    return SkippedStepsError(
      [
        f'stopped: {self.stop_after} steps in a row were skipped (guard.stop_after); the newest: '
        f'{self.last}',
        f'step {saved} is saved, with weights and optimizer as the last accepted step left them',
        f'{self.rows.path} names the documents of every skipped step',
        'the same command goes on behind them; if they are sound, lower optimizer.peak_lr',
      ]
    )


def describe(fault: int, values: dict[str, float], bounds: np.ndarray) -> str:
  """Says in words what was wrong with a step.

  Args:
    fault: number of the kind, from 1.
    values: `loss`, `grad_norm`, and `loss_scale` where there is one.
    bounds: [2], the largest loss and gradient norm that were no spike.
  """
  loss, norm = values['loss'], values['grad_norm']
  if fault == NONFINITE_LOSS:
    return f'a loss is not finite ({loss})'
  if fault == NONFINITE_GRADIENT:
    return f'the gradient is not finite (norm {norm}) though the loss is {loss:.4g}'
  if fault == OVERFLOW:
    return f'the gradient overflowed float16 at loss scale {values["loss_scale"]:g}'
  pairs = zip(('loss', 'gradient norm'), (loss, norm), bounds, strict=True)
  return ', '.join(
    f'{name} {value:.4g} leaps beyond {bound:.4g}' for name, value, bound in pairs if value > bound
  )
