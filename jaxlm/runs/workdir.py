"""Which run a folder belongs to: its config.json, and what may change on resuming."""

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from jaxlm import config, files
from jaxlm.errors import InputError
from jaxlm.launch.watch import SIGNS
from jaxlm.sharding.processes import first
from jaxlm.training.checkpoints import steps_in
from jaxlm.training.metrics import read

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
_UNUSABLE = (
  errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
  errno.ENOTDIR, errno.EEXIST,
)  # fmt: skip


def claim(workdir: epath.Path, run: Any, free: Sequence[str]) -> list[str]:
  """Makes the folder this run's own; returns what changed since it was last run.

  Fields that begin with a name in `free` may change. All may in a folder whose run left
  neither a checkpoint nor a step's row of metrics, so that a first try with a wrong
  path or name can be mended in place.

  Raises:
    InputError: the folder holds another run, or something that is no run.
  """
  file = workdir / CONFIG
  if not file.exists():
    if workdir.exists() and {place.name for place in workdir.iterdir()} - {SIGNS}:
      raise InputError(
        f"--workdir={workdir}: holds files and no {CONFIG}, so it is no run of jaxlm. "
        "Give a new or an empty folder."
      )
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_atomic(file, config.to_json(run))
    return []
  trained = any(row["step"] > 0 for row in read(workdir))
  if not steps_in(workdir / CHECKPOINTS) and not trained:
    files.write_atomic(file, config.to_json(run))
    return []
  changes = changes_since(file, run)
  fixed = [c for c in changes if not any(_within(c, name) for name in free)]
  if fixed:
    listed = "\n".join(f"  {line}" for line in fixed)
    raise InputError(
      f"--workdir={workdir}: holds another run. What differs from its {CONFIG}:\n"
      f"{listed}\nGive another --workdir, or these values back. On resuming only "
      f"{', '.join(free)} may change."
    )
  if changes:
    files.write_atomic(file, config.to_json(run))
  return changes


@contextlib.contextmanager
def held(workdir: epath.Path) -> Iterator[None]:
  """Keeps a folder for this run as long as the context lasts; the first process does.

  Raises:
    InputError: another process has it, or it is remote.
  """
  files.require_local(workdir, "--workdir")
  workdir.mkdir(parents=True, exist_ok=True)
  if not first():
    yield
    return
  place = os.open(workdir, os.O_RDONLY)
  try:
    try:
      fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise InputError(
        f"--workdir={workdir}: another process is running in it. Wait for it, stop it, "
        "or give another folder."
      ) from error
    yield
  finally:
    os.close(place)


@contextlib.contextmanager
def explained(workdir: epath.Path) -> Iterator[None]:
  """Turns a full or unusable disk below into an InputError that names the path."""
  try:
    yield
  except OSError as error:
    if error.errno not in _UNUSABLE:
      raise
    raise InputError(
      f"{error.filename or workdir}: {error.strerror}. Make room or give another path; "
      "the same command goes on from the newest checkpoint, if there is one."
    ) from error


def changes_since(file: epath.Path, run: Any) -> list[str]:
  """Returns "path: old -> new" for each field that differs from a config.json.

  Raises:
    InputError: the file is no config of this version.
  """
  try:
    before = config.from_json(file.read_text())
  except (InputError, json.JSONDecodeError) as error:
    raise InputError(f"{file}: not a config that can be read: {error}") from error
  return config.differences(before, run)


def _within(change: str, name: str) -> bool:
  path = change.split(":", 1)[0]
  return path == name or path.startswith(f"{name}.")
