"""Several processes on one machine, as a pod has them: a rehearsal without one.

  jaxlm-local --processes=4 --devices=2 --config=configs/quickstart.py --workdir=runs/x

Each process has its own virtual CPU devices. When one dies, the others are stopped and
its name is told. Everything but these two flags goes to `jaxlm`.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

from jaxlm.launch.pods import ADDRESS, COUNT, INDEX

GRACE_SECONDS = 5.0
"""What the others get to say why they stop, once one is gone."""


def environment(
  address: str, process: int, processes: int, devices: int
) -> dict[str, str]:
  """Returns the variables of one process."""
  own = {ADDRESS: address, COUNT: str(processes), INDEX: str(process)}
  cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
  return dict(os.environ) | own | cpu


def free_address() -> str:
  """Returns an address of this machine with a port that nobody has."""
  with socket.socket() as taken:
    taken.bind(("localhost", 0))
    return f"localhost:{taken.getsockname()[1]}"


def run(command: Sequence[str], processes: int, devices: int) -> int:
  """Runs a command in so many processes; returns the exit code of the whole.

  Lines of processes other than the first carry their number. Ctrl-C reaches all of
  them, and is waited for.
  """
  address = free_address()
  children = [
    subprocess.Popen(
      command,
      env=environment(address, process, processes, devices),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )
    for process in range(processes)
  ]
  readers = [
    threading.Thread(target=_copy, args=(child.stdout, number))
    for number, child in enumerate(children)
  ]
  for reader in readers:
    reader.start()
  code = _wait(children)
  for reader in readers:
    reader.join()
  return code


def _copy(stream: IO[str] | None, process: int) -> None:
  assert stream is not None
  mark = f"[{process}] " if process else ""
  with stream:
    for line in stream:
      if not line.startswith("[Gloo] Rank"):  # tells who is connected to whom
        sys.stdout.write(f"{mark}{line}")
        sys.stdout.flush()


def _wait(children: list[subprocess.Popen]) -> int:
  while True:
    try:
      codes = [child.poll() for child in children]
      lost = [i for i, code in enumerate(codes) if code not in (None, 0)]
      if lost:
        return _end(children, lost[0])
      if all(code == 0 for code in codes):
        return 0
      time.sleep(0.05)
    except KeyboardInterrupt:
      for child in children:
        child.send_signal(signal.SIGINT)


def _end(children: list[subprocess.Popen], lost: int) -> int:
  """Stops the rest; returns the exit code of the one that went first."""
  code = children[lost].returncode
  end = time.monotonic() + GRACE_SECONDS
  while time.monotonic() < end and any(child.poll() is None for child in children):
    time.sleep(0.05)
  stopped = [i for i, child in enumerate(children) if child.poll() is None]
  for i in stopped:
    children[i].kill()
  for child in children:
    child.wait()
  if code < 0:
    print(
      f"error: process {lost} was lost (killed by {signal.Signals(-code).name}); the "
      f"others were stopped. The same command goes on from the last checkpoint.",
      file=sys.stderr,
    )
    return 75
  return code


def main() -> None:
  """The console command."""
  sizes = {"processes": 2, "devices": 1}
  rest = []
  for word in sys.argv[1:]:
    found = re.fullmatch(r"--(processes|devices)=(\d+)", word)
    if found and int(found[2]) > 0:
      sizes[found[1]] = int(found[2])
    else:
      rest.append(word)
  if not rest or {"--help", "-h"} & set(rest):
    print(__doc__)
    sys.exit(0 if rest else 2)
  command = [sys.executable, "-m", "jaxlm", *rest]
  sys.exit(run(command, sizes["processes"], sizes["devices"]))


if __name__ == "__main__":
  main()
