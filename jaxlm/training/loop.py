"""The loop: batch -> step -> metrics, evaluation, checkpoint, in that order."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from jaxlm.training.checkpoints import Store
from jaxlm.training.faults import graceful, require_finite
from jaxlm.training.metrics import Silent, Writer
from jaxlm.training.objective import Batch
from jaxlm.training.state import TrainState
from jaxlm.training.step import Metrics


class Parts(NamedTuple):
  """What the loop works with."""

  step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
  """Compiled; takes the state's buffers."""
  batches: Iterator[Batch]
  """Global arrays on the mesh, from the first step on."""
  evaluate: Callable[[TrainState], dict[str, float]]
  store: Store
  writer: Writer | Silent
  told: dict[str, str]
  """Hashes kept with each checkpoint: of the rows, of a frozen base."""
  vote: Callable[[bool], bool]
  """Whether any process was asked to stop."""


class Cadence(NamedTuple):
  """When things happen, in steps."""

  steps: int
  log: int
  evaluate: int
  save: int
  tokens: int
  """Tokens in a batch, for the speed shown."""


class Outcome(NamedTuple):
  """How the loop ended."""

  state: TrainState
  step: int
  stopped: str | None
  """The signal that ended it early, if one did."""


def train(parts: Parts, cadence: Cadence, state: TrainState, start: int) -> Outcome:
  """Runs from step `start` to `cadence.steps`.

  The metrics of a step are fetched while the next one runs. Before a checkpoint is
  written, they are known to be finite, and every row up to its step stands in
  metrics.jsonl, so that a killed run goes on with the rows of an uninterrupted one.

  Raises:
    InputError: the loss or gradient is not finite, or a checkpoint cannot be written.
  """
  clock = Clock(cadence.tokens)
  late: tuple[int, Metrics] | None = None

  def report() -> None:
    nonlocal late
    if late is None:
      return
    step, metrics = late
    late = None
    row = {name: float(value) for name, value in jax.device_get(metrics).items()}
    require_finite(step, {name: row[name] for name in ("loss", "grad_norm")})
    speed = clock.tick(step)
    logged = step % cadence.log == 0 or step == cadence.steps
    if logged:
      parts.writer.write(step, row | speed)
    left = (cadence.steps - step) * clock.seconds_a_step
    shown = {"loss": row["loss"], "tok/s": speed["tokens_per_second"], "left_s": left}
    parts.writer.progress(step, shown, logged)

  step = start
  clock.start(start)
  with graceful() as stop:
    done = step >= cadence.steps
    while not done:
      batch = next(parts.batches)
      state, metrics = parts.step(state, batch)
      parts.store.check()
      report()
      step += 1
      late = (step, metrics)
      ends = step == cadence.steps
      evaluates = ends or step % cadence.evaluate == 0
      if evaluates:
        report()
        scores = parts.evaluate(state)
        require_finite(step, scores)
        parts.writer.write(step, scores)
        parts.writer.say(f"step {step}/{cadence.steps}  {words(scores)}")
      asked = parts.vote(stop.reason is not None)
      done = ends or asked
      saves = done or step % cadence.save == 0
      if saves:
        report()
        data = {"next_batch": step} | parts.told
        parts.store.save(step, state, data)
      if evaluates or saves:
        clock.start(step)
    parts.store.wait()
  reason = stop.reason or "a signal to another process"
  return Outcome(state, step, reason if step < cadence.steps else None)


class Clock:
  """Speed between reports, without the time of evaluations and saves."""

  def __init__(self, tokens: int):
    """`tokens` is the number in a batch."""
    self._tokens = tokens
    self._since = (0, 0.0)
    self.seconds_a_step = 0.0

  def start(self, step: int) -> None:
    """Begins to count at a step."""
    self._since = (step, time.perf_counter())

  def tick(self, step: int) -> dict[str, float]:
    """Returns seconds a step and tokens a second since the last call."""
    before, at = self._since
    now = time.perf_counter()
    seconds = (now - at) / max(step - before, 1)
    self._since = (step, now)
    smooth = 0.9 * self.seconds_a_step + 0.1 * seconds
    self.seconds_a_step = smooth if self.seconds_a_step else seconds
    return {"seconds": seconds, "tokens_per_second": self._tokens / max(seconds, 1e-9)}


def words(scores: dict[str, float]) -> str:
  """Returns scores as one line."""
  return "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
