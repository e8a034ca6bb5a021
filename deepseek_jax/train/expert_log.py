"""The host's side of experts that come and go: every event is shown, faults are written out."""

from typing import Any

import jax
import numpy as np

from deepseek_jax.core.tree import flatten
from deepseek_jax.models.decoder import canonical, layer_of
from deepseek_jax.models.plan import Segment
from deepseek_jax.train.display import Display
from deepseek_jax.train.expert_lifecycle import BORN, EVENTS
from deepseek_jax.train.metrics import JsonLines

_WORDS = {
  'weights': 'out of use: its weights are not finite; left out from this step on',
  'output': 'out of use: what it makes of finite tokens is not finite',
  'gradient': 'out of use: the gradient of its weights is not finite',
  'retried': 'on trial, as a copy of a healthy one',
  'closed': 'back in use',
}


class ExpertLog:
  """Reads of every finished step which experts came or went; writes to `faults.jsonl`.

  Attributes:
    rows: the file, one JSON object for each expert that was opened, tried again or closed.
    exhausted: whether the run is to stop: a layer has no expert left.
    last: the newest event in words, or None.
  """

  def __init__(self, rows: JsonLines, display: Display, segments: tuple[Segment, ...]):
    """Remembers where to write.

    Args:
      rows: the file.
      display: shows a line for each event.
      segments: the plan of the stack.
    """
    self.rows = rows
    self._display, self._segments = display, segments
    self.exhausted = False
    self.last: str | None = None

  def read(self, step: int, metrics: dict[str, Any]) -> None:
    """Takes `experts` out of a finished step's metrics, and says what happened to whom.

    One scalar of a step that is done comes to the host; the rest only after an event.

    Args:
      step: the number of the step.
      metrics: what the step returned.
    """
    report = metrics.pop('experts', None)
    if report is None or not bool(report['changed']):
      return
    report = jax.device_get(report)
    self.exhausted |= int(report['usable']) < 1
    for address, events in flatten(canonical(report['events'], self._segments)).items():
      layer = layer_of(address)
      born = np.flatnonzero(events == BORN)
      if born.size:
        numbers = ', '.join(map(str, born))
        self._display.message(f'step {step}: {layer}: experts born: {numbers}')
      for expert in np.flatnonzero((events > 0) & (events != BORN)).tolist():
        kind = EVENTS[events[expert]]
        self.last = f'{layer}: expert {expert} is {_WORDS[kind]}'
        row = {'step': step, 'kind': f'expert_{kind}', 'message': self.last}
        self.rows.append({**row, 'layer': layer, 'expert': expert})
        self._display.message(f'step {step}: {self.last}')
