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

from jaxlm.errors import InputError
from jaxlm.launch.pods import ADDRESS, COUNT, INDEX
from jaxlm.launch.threads import room_to_wait

GRACE_SECONDS = 5.0
"""What the others get to say why they stop, once one is gone."""


class _Terminated(KeyboardInterrupt):
  """SIGTERM, as Python raises SIGINT."""


def environment(
  address: str, process: int, processes: int, devices: int
) -> dict[str, str]:
  """Returns the variables of one process."""
  own = {ADDRESS: address, COUNT: str(processes), INDEX: str(process)}
  cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
  return room_to_wait(dict(os.environ) | own | cpu)


def free_address() -> str:
  """Returns an address of this machine with a port that nobody has."""
  with socket.socket() as taken:
    taken.bind(("localhost", 0))
    return f"localhost:{taken.getsockname()[1]}"


def run(command: Sequence[str], processes: int, devices: int) -> int:
  """Runs a command in so many processes; returns the exit code of the whole.

  Lines of processes other than the first carry their number. Ctrl-C and
  SIGTERM reach all of them, and are waited for; none outlives this call.
  """
  address = free_address()
  children: list[subprocess.Popen] = []
  readers: list[threading.Thread] = []
  before = signal.signal(signal.SIGTERM, _terminate)
  try:
    for process in range(processes):
      child = subprocess.Popen(
        command,
        env=environment(address, process, processes, devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
      )
      children.append(child)
      readers.append(threading.Thread(target=_copy, args=(child.stdout, process)))
      readers[-1].start()
    return _wait(children)
  finally:
    for child in children:
      child.kill()
    for reader in readers:
      reader.join()
    signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: object) -> None:
  del number, frame
  raise _Terminated


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
    except KeyboardInterrupt as asked:
      told = signal.SIGTERM if isinstance(asked, _Terminated) else signal.SIGINT
      for child in children:
        child.send_signal(told)


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


def split(words: Sequence[str]) -> tuple[dict[str, int], list[str]]:
  """Splits the two flags of this command from those for `jaxlm`.

  Raises:
    InputError: one of the two has no count of at least 1.
  """
  sizes, rest = {"processes": 2, "devices": 1}, []
  left = iter(words)
  for word in left:
    found = re.fullmatch(r"--?(processes|devices)(?:=(.*))?", word)
    if found is None:
      rest.append(word)
      continue
    value = next(left, "") if found[2] is None else found[2]
    if not re.fullmatch(r"[1-9]\d*", value):
      raise InputError(f"--{found[1]}: {value!r} is no whole number of at least 1.")
    sizes[found[1]] = int(value)
  return sizes, rest


def main() -> None:
  """The console command."""
  try:
    sizes, rest = split(sys.argv[1:])
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  if not rest or {"--help", "-h"} & set(rest):
    print(__doc__)
    sys.exit(0 if rest else 2)
  command = [sys.executable, "-m", "jaxlm", *rest]
  sys.exit(run(command, sizes["processes"], sizes["devices"]))


if __name__ == "__main__":
  main()
