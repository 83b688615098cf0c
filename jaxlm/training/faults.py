"""What stops a run early: Ctrl-C, SIGTERM, values that are not finite, full disks."""

import contextlib
import functools
import logging
import math
import signal
import sys
from collections.abc import Iterator

from jaxlm.errors import InputError


class Stop:
  """Whether the user or the machine has asked the run to end."""

  def __init__(self):
    self.reason: str | None = None

  def ask(self, number: int, _frame: object) -> None:
    """Notes the first signal; the second one interrupts at once."""
    if self.reason is not None:
      raise KeyboardInterrupt
    self.reason = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextlib.contextmanager
def graceful() -> Iterator[Stop]:
  """Turns the first Ctrl-C or SIGTERM into a note that the loop reads after a step.

  Outside the main thread (a notebook's worker) signals stay as they are.
  """
  stop = Stop()
  before = {}
  try:
    for number in (signal.SIGINT, signal.SIGTERM):
      with contextlib.suppress(ValueError):
        before[number] = signal.signal(number, stop.ask)
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


class Diverged(InputError):
  """A loss, gradient or score that is not finite."""

  def __init__(self, step: int, name: str, value: float):
    super().__init__(
      f"step {step}: {name} is {value}. Nothing was saved since the last "
      "checkpoint. Lower optimizer.lr.peak, lengthen its warmup, or lower "
      "optimizer.clip, then run the same command in a new --workdir."
    )
    self.step = step


def require_finite(step: int, metrics: dict[str, float]) -> None:
  """Raises Diverged naming the step and the first value that is not finite."""
  for name, value in metrics.items():
    if not math.isfinite(value):
      raise Diverged(step, name, value)


@functools.cache
def quiet_failed_saves() -> None:
  """Keeps the tracebacks that a failed save makes beside its exception off stderr.

  For every array Orbax logs one, asyncio another, and TensorStore calls back into an
  event loop that is gone. The exception itself is raised to the caller.
  """

  def keep(record: logging.LogRecord) -> bool:
    lost = "never retrieved" in record.getMessage() and "orbax" in record.getMessage()
    return not (lost or ("/orbax/" in record.pathname and record.exc_info))

  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(keep)
  before = sys.unraisablehook

  def hook(unraisable: "sys.UnraisableHookArgs") -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      before(unraisable)

  sys.unraisablehook = hook
