"""Each process watches the others, so that none waits for one that is gone.

Where a collective does not fail by itself (on TPUs it waits), or fails without a name,
this says which process was lost, and ends this one. Signs of life are small files in a
folder that all processes see.
"""

import os
import pathlib
import socket
import sys
import threading
import time

SIGNS = "processes"
"""The folder in a workdir for signs of life."""
BEAT_SECONDS = 2.0
LOST_SECONDS = 16.0
"""Without a sign for so long, by the watcher's own clock, a process is lost."""
EXIT = 75
"""EX_TEMPFAIL: starting again goes on from the last checkpoint."""


class Watch:
  """Beats and listens in a thread, from `start` on to `stop`."""

  def __init__(self, folder: pathlib.Path, process: int, processes: int):
    """`folder` is shared by the processes and belongs to this run alone."""
    self._folder, self._process, self._processes = folder, process, processes
    self._seen: dict[int, tuple[str, float]] = {}
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._beats = 0
    self._told = False

  def start(self) -> None:
    """Begins to beat."""
    self._beat()
    self._thread.start()

  def stop(self) -> None:
    """Says that this process ends as it should."""
    self._stopped.set()
    self._thread.join()
    self._write("done")

  def wait(self, seconds: float) -> str | None:
    """Returns the first loss that is noticed within a time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      if lost := self.lost():
        return lost
      time.sleep(0.2)
    return None

  def lost(self) -> str | None:
    """Returns what is known of a process that gives no sign, if there is one."""
    now = time.monotonic()
    for process in range(self._processes):
      if process == self._process:
        continue
      before, since = self._seen.setdefault(process, ("", now))
      sign = self._read(process) or before
      if sign != before:
        self._seen[process] = (sign, now)
      elif not sign.startswith("done") and now - since > LOST_SECONDS:
        host = sign.partition(" ")[2] or "a host that never began"
        return f"process {process} on {host} gave no sign for {now - since:.0f} s"
    return None

  def _run(self) -> None:
    while not self._stopped.wait(BEAT_SECONDS):
      if not self._beat():
        self._seen.clear()  # who cannot write here cannot judge the others' silence
      elif lost := self.lost():
        give_up(self._process, lost)

  def _beat(self) -> bool:
    self._beats += 1
    return self._write(str(self._beats))

  def _write(self, sign: str) -> bool:
    """Returns whether it could; the folder is made again where it is gone."""
    file = self._folder / str(self._process)
    new = file.with_suffix(".new")
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      new.write_text(f"{sign}.{os.getpid()} {socket.gethostname()}")
      new.replace(file)
    except OSError as error:
      self._tell(error)
      return False
    return True

  def _read(self, process: int) -> str:
    """Returns a process's sign; empty where there is none that can be read."""
    try:
      return (self._folder / str(process)).read_text()
    except FileNotFoundError:
      return ""
    except OSError as error:
      self._tell(error)
      return ""

  def _tell(self, error: OSError) -> None:
    if not self._told:
      self._told = True
      print(
        f"process {self._process}: signs of life cannot be written or read ({error}); "
        "the run goes on, and this is told once.",
        file=sys.stderr,
        flush=True,
      )


def give_up(process: int, why: str) -> None:
  """Ends this process at once: an orderly end would wait for the lost one."""
  print(
    f"error: process {process} stops: {why}. Start all processes again: the same "
    "command goes on from the last checkpoint.",
    file=sys.stderr,
    flush=True,
  )
  sys.stdout.flush()
  os._exit(EXIT)
