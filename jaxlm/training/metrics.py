"""Where numbers go: metrics.jsonl, TensorBoard, loss.png, the progress line."""

import json
import math
import sys
from types import TracebackType
from typing import Any

import tqdm
from etils import epath
from tensorboardX import SummaryWriter

from jaxlm import files

METRICS = "metrics.jsonl"
TIMES = ("seconds", "tokens_per_second")


class Writer:
  """Writes rows of one run; on resume, rows past the restored step are dropped."""

  def __init__(self, workdir: epath.Path, *, start: int, total: int):
    """Opens the files; `start` is the step restored, `total` the last step."""
    self._file = workdir / METRICS
    rows = [row for row in read(workdir) if row["step"] <= start]
    if start and rows or self._file.exists():
      text = "".join(json.dumps(row) + "\n" for row in rows)
      files.write_atomic(self._file, text)
    self._lines = self._file.open("a")
    self._events = SummaryWriter(
      str(workdir / "tensorboard"), purge_step=start + 1, write_to_disk=True
    )
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
    self._lines.close()
    self._events.close()

  def write(self, step: int, row: dict[str, Any]) -> None:
    """Appends a row; numbers also go to TensorBoard."""
    self._lines.write(json.dumps({"step": step} | row) + "\n")
    self._lines.flush()
    for name, value in row.items():
      if isinstance(value, int | float):
        self._events.add_scalar(name, value, step)

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


def _short(value: float) -> str:
  return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def read(workdir: epath.Path) -> list[dict[str, Any]]:
  """Returns the rows of a run's metrics.jsonl; a torn last line is left out."""
  file = workdir / METRICS
  if not file.exists():
    return []
  lines = file.read_text().split("\n")
  return [json.loads(line) for line in lines[:-1]]


def plot(workdir: epath.Path) -> None:
  """Draws loss.png: training loss, and bits per byte on the held-out text."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = read(workdir)
  figure = Figure(figsize=(8, 5), layout="constrained")
  canvas = FigureCanvasAgg(figure)
  axes = figure.subplots()
  train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
  if train:
    axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1, label="training")
  axes.set_xlabel("step")
  axes.set_ylabel("training loss, nats per token")
  axes.grid(alpha=0.3)
  held_out = [
    (r["step"], r["held_out/bits_per_byte"])
    for r in rows
    if "held_out/bits_per_byte" in r
  ]
  if held_out:
    right = axes.twinx()
    right.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", label="held out")
    right.set_ylabel("held-out bits per byte")
    finite = [y for _, y in held_out if math.isfinite(y)]
    right.annotate(f"{finite[-1]:.3f}", held_out[-1], xytext=(-8, 8),
                   textcoords="offset points", ha="right")  # fmt: skip
  figure.legend(loc="upper right", bbox_to_anchor=(0.88, 0.95))
  with (workdir / "loss.png").open("wb") as file:
    canvas.print_png(file)
