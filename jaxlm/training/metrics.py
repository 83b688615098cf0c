"""Where numbers go: metrics.jsonl, TensorBoard, loss.png, the progress line."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import tqdm
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2 as proto
from tensorboardX.summary import scalar

from jaxlm import files
from jaxlm.errors import InputError
from jaxlm.sharding.processes import first

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
TIMES = ("seconds", "tokens_per_second")
FLUSH_SECONDS = 10.0
_EVENT: Any = proto  # its classes are made when it is imported


class Silent:
  """What a process has that does not write."""

  def __enter__(self) -> "Silent":
    return self

  def __exit__(self, *_: object) -> None:
    pass

  def write(self, step: int, row: dict[str, Any]) -> None:
    """Does nothing."""

  def progress(self, step: int, shown: dict[str, float], log: bool) -> None:
    """Does nothing."""

  def say(self, text: str) -> None:
    """Does nothing."""


def open_writer(workdir: epath.Path, *, start: int, total: int) -> "Writer | Silent":
  """Returns the writer of the first process, and for the others one that is silent.

  Raises:
    InputError: what `Writer` raises.
  """
  return Writer(workdir, start=start, total=total) if first() else Silent()


class Writer:
  """Writes rows of one run; on resume, rows past the restored step are dropped."""

  def __init__(self, workdir: epath.Path, *, start: int, total: int):
    """Opens the files; `start` is the step restored, `total` the last step.

    Raises:
      InputError: metrics.jsonl cannot be read or written.
    """
    self._file = workdir / METRICS
    rows = [row for row in read(workdir) if start > 0 and row["step"] <= start]
    with self._explained():
      if self._file.exists():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        files.write_atomic(self._file, text)
      self._events = Events(workdir / EVENTS, start)
      self._lines = self._file.open("a")
    self._bar = tqdm.tqdm(
      total=total, initial=start, unit="step", dynamic_ncols=True, mininterval=0.5,
      disable=not sys.stderr.isatty(),
    )  # fmt: skip
    self._total = total

  def __enter__(self) -> "Writer":
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._bar.close()
    # After an error these may fail again, and the first one is the one to tell.
    for file in (self._lines, self._events):
      with contextlib.suppress(OSError) if error else self._explained():
        file.close()

  def write(self, step: int, row: dict[str, Any]) -> None:
    """Appends a row; numbers also go to TensorBoard.

    Raises:
      InputError: the disk is full, or the file cannot be written.
    """
    with self._explained():
      self._lines.write(json.dumps({"step": step} | row) + "\n")
      self._lines.flush()
      self._events.write(step, row)

  def progress(self, step: int, shown: dict[str, float], log: bool) -> None:
    """Moves the progress bar, or prints a line where no terminal shows one."""
    text = "  ".join(f"{name} {_short(value)}" for name, value in shown.items())
    self._bar.set_postfix_str(text, refresh=False)
    self._bar.update(step - self._bar.n)
    if log and self._bar.disable:
      self.say(f"step {step}/{self._total}  {text}")

  def say(self, text: str) -> None:
    """Prints a line above the progress bar."""
    tqdm.tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise InputError(
        f"{self._file}: cannot be written ({error.strerror or error}). Mend this, for "
        "example make room on the disk, and run the same command: it goes on from the "
        "newest checkpoint."
      ) from error


class Events:
  """Scalars for TensorBoard, written in the caller's thread, where errors are seen."""

  def __init__(self, folder: epath.Path, start: int):
    """Opens a new event file; TensorBoard hides what older ones hold past `start`."""
    folder.mkdir(parents=True, exist_ok=True)
    self._writer = EventsWriter(str(folder / "events"))
    began = _EVENT.SessionLog(status=_EVENT.SessionLog.START)
    self._add(_EVENT.Event(step=start + 1, session_log=began))
    self._flushed = time.monotonic()

  def write(self, step: int, row: dict[str, Any]) -> None:
    """Adds the numbers of a row."""
    for name, value in row.items():
      if isinstance(value, int | float):
        self._add(_EVENT.Event(step=step, summary=scalar(name, value)))
    if time.monotonic() > self._flushed + FLUSH_SECONDS:
      self._writer.flush()
      self._flushed = time.monotonic()

  def close(self) -> None:
    """Writes what is left."""
    self._writer.close()

  def _add(self, event: Any) -> None:
    event.wall_time = time.time()
    self._writer.write_event(event)


def _short(value: float) -> str:
  return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def read(workdir: epath.Path) -> list[dict[str, Any]]:
  """Returns the rows of a run's metrics.jsonl; a torn last line is left out.

  Raises:
    InputError: another line is no row.
  """
  file = workdir / METRICS
  if not file.exists():
    return []
  rows = []
  for number, line in enumerate(file.read_text().split("\n")[:-1], 1):
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError as error:
      raise InputError(
        f"{file}, line {number}: not JSON ({error}). Delete this line, or the file; "
        "checkpoints do not need it."
      ) from error
  return rows


def plot(workdir: epath.Path) -> None:
  """Draws loss.png: training loss, and bits per byte on the held-out text.

  Draws nothing where there is no row yet.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = read(workdir)
  if not rows:
    return
  figure = Figure(figsize=(8, 5), layout="constrained")
  canvas = FigureCanvasAgg(figure)
  axes = figure.subplots()
  train = _series(rows, "loss")
  if train:
    axes.plot(*zip(*train, strict=True), color="tab:blue", label="training")
  axes.set_xlabel("step")
  axes.set_ylabel("training loss, nats per token")
  axes.grid(alpha=0.3)
  held_out = _series(rows, "held_out/bits_per_byte")
  if held_out:
    right = axes.twinx()
    right.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    right.set_ylabel("held-out bits per byte")
    right.annotate(f"{held_out[-1][1]:.3f}", held_out[-1], xytext=(-8, 8),
                   textcoords="offset points", ha="right")  # fmt: skip
  figure.legend(loc="upper right", bbox_to_anchor=(0.88, 0.95))
  with (workdir / "loss.png").open("wb") as file:
    canvas.print_png(file)


def _series(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
  return [(r["step"], r[name]) for r in rows if name in r and math.isfinite(r[name])]
