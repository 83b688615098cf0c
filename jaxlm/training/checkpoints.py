"""Checkpoints: Orbax writes the arrays, a manifest of ours says that they are whole.

    <workdir>/checkpoints/00000200/
      arrays/params/  Orbax: the parameters alone
      arrays/rest/    Orbax: step, optimizer, rng, averages
      config.json     the run that wrote it
      data.json       where the data stands
      manifest.json   size and hash of every other file

A step counts only once its manifest stands, and the manifest is written last. Restoring
reads every byte back and compares, for Orbax does not notice a flipped byte in an
array; a step that fails is named and the step before it is used.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
import xxhash
from etils import epath

from jaxlm import files
from jaxlm.errors import InputError
from jaxlm.shapes import PyTree
from jaxlm.sharding import processes
from jaxlm.training.faults import quiet_failed_saves
from jaxlm.training.state import Plan, TrainState
from jaxlm.trees import named_leaves

MANIFEST = "manifest.json"
ARRAYS = "arrays"
BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
  """When checkpoints are written and which are kept."""

  every: int = 100
  """Steps between two checkpoints; the last step always has one."""
  keep: int = 2
  """How many of the newest are kept."""
  keep_every: int | None = None
  """Steps divisible by this are kept for good; None: none is."""

  def __post_init__(self):
    if self.every < 1:
      raise InputError(f"checkpoints.every: {self.every} is under 1.")
    if self.keep < 1:
      raise InputError(f"checkpoints.keep: {self.keep} is under 1.")
    if self.keep_every is not None and self.keep_every < 1:
      raise InputError(f"checkpoints.keep_every: {self.keep_every} is under 1.")


class Restored(NamedTuple):
  """A checkpoint read back."""

  state: TrainState
  step: int
  data: dict[str, Any]


class Store:
  """The checkpoints of one run.

  Saving copies the state off the devices and returns; writing, hashing and deleting go
  on behind. A failure behind is raised by the next call.
  """

  def __init__(
    self,
    directory: epath.Path,
    spec: Checkpoints,
    config: str,
    *,
    tell: Callable[[str], None] = print,
  ):
    """Opens a folder of checkpoints; `config` is the run's config.json."""
    self._directory = directory
    self._spec = spec
    self._config = config
    self._tell = tell
    quiet_failed_saves()
    self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    self._thread: threading.Thread | None = None
    self._failure: BaseException | None = None

  def steps(self) -> list[int]:
    """Returns the steps that have a manifest, oldest first."""
    return steps_in(self._directory)

  def save(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
    """Starts saving; `data` is the small state of the data loader.

    Raises:
      InputError: the disk is too full, or the save before failed.
    """
    self.wait()
    folder = self._directory / folder_name(step)
    processes.lead(f"checkpoint {step}", lambda: self._make_room(step, folder, state))
    rest = state._replace(params=None)
    items = ocp.args.Composite(
      params=ocp.args.StandardSave(state.params),
      rest=ocp.args.StandardSave(_without_none(rest)),
    )
    with self._explained(step):
      self._orbax.save(folder / ARRAYS, items)
    self._thread = threading.Thread(target=self._commit, args=(step, folder, data))
    self._thread.start()

  def _make_room(self, step: int, folder: epath.Path, state: TrainState) -> None:
    if (folder / MANIFEST).exists():
      raise InputError(f"{folder}: a checkpoint stands here already and is kept.")
    with self._explained(step):
      if folder.exists():
        folder.rmtree()
      self._require_space(state)
      folder.mkdir(parents=True)

  def wait(self) -> None:
    """Waits for the save under way.

    Raises:
      InputError: it failed.
    """
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    self.check()

  def check(self) -> None:
    """Raises InputError where the save behind has failed; waits for nothing."""
    if self._failure is not None:
      failure, self._failure = self._failure, None
      raise failure

  def close(self) -> None:
    """Waits, then ends Orbax's threads."""
    try:
      self.wait()
    finally:
      self._orbax.close()

  def restore(self, plan: Plan) -> Restored | None:
    """Returns the newest checkpoint that is whole, or None where there is none.

    Raises:
      InputError: checkpoints exist and none is whole, or it is another model's.
    """
    whole = processes.lead("checkpoints", self._newest_whole)
    step = processes.from_first(-1 if whole is None else whole)
    return None if step < 0 else self._read(step, plan)

  def _newest_whole(self) -> int | None:
    steps = self.steps()
    for step in reversed(steps):
      folder = self._directory / folder_name(step)
      broken = verify(folder)
      if not broken:
        return step
      self._tell(f"CHECKPOINT {folder} IS DAMAGED and is not used: {broken}")
    if steps:
      raise InputError(
        f"{self._directory}: no checkpoint of {steps} is whole. Bring one back from a "
        "copy, or start anew in another --workdir."
      )
    return None

  def clear(self, step: int) -> None:
    """Makes room for the steps past the one that was restored.

    What stands there is damaged or was cut short. Where it still holds arrays it is set
    aside under another name, so that nothing is lost; the rest is deleted.
    """
    processes.lead("checkpoints", lambda: self._clear(step))

  def _clear(self, step: int) -> None:
    whole = self.steps()
    for found in _numbered(self._directory):
      folder = self._directory / folder_name(found)
      if found <= step and found in whole:
        continue
      if not (folder / ARRAYS).exists():
        folder.rmtree()
        self._tell(f"{folder}: a save that was cut short is deleted")
        continue
      aside = folder.with_name(f"{folder.name}.unused-{uuid.uuid4().hex[:6]}")
      folder.rename(aside)
      self._tell(f"{folder}: not a whole checkpoint; set aside as {aside.name}")

  def _read(self, step: int, plan: Plan) -> Restored:
    folder = self._directory / folder_name(step)
    target = jax.tree.map(
      lambda shape, sharding: jax.ShapeDtypeStruct(
        shape.shape, shape.dtype, sharding=sharding
      ),
      plan.shapes,
      plan.shardings,
    )
    check_same_model(folder, target.params)
    rest = _without_none(target._replace(params=None))
    items = ocp.args.Composite(
      params=ocp.args.StandardRestore(target.params),
      rest=ocp.args.StandardRestore(rest),
    )
    read = self._orbax.restore(folder / ARRAYS, items)
    state = TrainState(**{"ema": None} | read["rest"], params=read["params"])
    data = json.loads((folder / "data.json").read_text())
    return Restored(state, step, data)

  def _require_space(self, state: TrainState) -> None:
    need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    place = self._directory
    while not place.exists():
      place = place.parent
    free = shutil.disk_usage(place).free
    if free < need:
      raise InputError(
        f"{self._directory}: a checkpoint needs up to {need / 1e6:,.0f} MB and "
        f"{free / 1e6:,.0f} MB are free. Free some space or choose another --workdir; "
        "the checkpoints so far are whole and the same command goes on from them."
      )

  def _commit(self, step: int, folder: epath.Path, data: dict[str, Any]) -> None:
    try:
      with self._explained(step):
        self._orbax.wait_until_finished()
        if not processes.first():
          return
        files.write_atomic(folder / "config.json", self._config)
        files.write_atomic(folder / "data.json", json.dumps(data))
        write_manifest(folder)
        self._prune()
    except BaseException as error:
      self._failure = error

  def _prune(self) -> None:
    steps = self.steps()
    kept = set(steps[-self._spec.keep :])
    if self._spec.keep_every is not None:
      kept |= {step for step in steps if step % self._spec.keep_every == 0}
    for step in steps:
      if step not in kept:
        _delete(self._directory / folder_name(step))

  @contextlib.contextmanager
  def _explained(self, step: int):
    try:
      yield
    except InputError:
      raise
    except Exception as error:
      full = "No space left" in str(error) or "RESOURCE_EXHAUSTED" in str(error)
      first = str(error).partition("\n")[0] or type(error).__name__
      why = "the disk is full" if full else first
      raise InputError(
        f"{self._directory / folder_name(step)}: the checkpoint could not be written: "
        f"{why}. The checkpoints before it are whole; mend this and run the same "
        "command."
      ) from error


def steps_in(directory: epath.Path) -> list[int]:
  """Returns the steps that have a manifest, oldest first."""
  found = _numbered(directory)
  return [step for step in found if (directory / folder_name(step) / MANIFEST).exists()]


def saved_shapes(folder: epath.Path) -> dict[str, tuple[int, ...]]:
  """Returns {parameter name: shape} of a checkpoint, from its metadata alone."""
  metadata = ocp.PyTreeCheckpointHandler().metadata(folder / ARRAYS / "params")
  leaves = named_leaves(metadata.tree)
  return {name: tuple(leaf.shape) for name, leaf in leaves.items()}


def check_same_model(folder: epath.Path, params: PyTree) -> None:
  """Raises InputError where a checkpoint's parameters have other names or shapes."""
  saved = saved_shapes(folder)
  wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(params).items()}
  if saved == wanted:
    return
  for name in sorted(saved.keys() | wanted.keys()):
    if saved.get(name) != wanted.get(name):
      raise InputError(
        f"{folder}: a checkpoint of another model. Parameter {name!r} is "
        f"{saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} in this "
        "config. Use the config that wrote it (config.json beside it), or another "
        "--workdir."
      )


def write_manifest(folder: epath.Path) -> None:
  """Says that a folder is whole: writes the size and hash of every file in it."""
  files.write_atomic(folder / MANIFEST, json.dumps(_hashes(folder), indent=1))


def verify(folder: epath.Path) -> str:
  """Returns what is wrong with a checkpoint's files, or an empty string.

  Raises:
    InputError: the disk would not read them, which says nothing about them.
  """
  try:
    wanted = json.loads((folder / MANIFEST).read_text())
    found = _hashes(folder)
  except ValueError as error:
    return f"{MANIFEST} is not what was written ({error})"
  except OSError as error:
    raise InputError(
      f"{error.filename or folder}: cannot be read ({error.strerror or error}). "
      "Nothing was changed; mend the disk or the rights and run the same command."
    ) from error
  for name in sorted(wanted.keys() | found.keys()):
    if name not in found:
      return f"{name} is missing"
    if name not in wanted:
      return f"{name} is not in the manifest"
    if wanted[name] != found[name]:
      return f"{name} has other bytes than were written"
  return ""


def _hashes(folder: epath.Path) -> dict[str, list]:
  """Returns {file: [bytes, xxh3-128]} of every file but the manifest."""
  table = {}
  root = os.fspath(folder)
  for place in _files(folder):
    name = os.path.relpath(os.fspath(place), root)
    if name == MANIFEST:
      continue
    digest, size = xxhash.xxh3_128(), 0
    with place.open("rb") as file:
      while block := file.read(BLOCK):
        digest.update(block)
        size += len(block)
    table[name] = [size, digest.hexdigest()]
  return table


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for place in sorted(folder.iterdir()):
    if place.is_dir():
      yield from _files(place)
    else:
      yield place


def _numbered(directory: epath.Path) -> list[int]:
  if not directory.exists():
    return []
  steps = [int(p.name) for p in directory.iterdir() if p.name.isdigit()]
  return sorted(steps)


def folder_name(step: int) -> str:
  """Returns the name of a step's folder."""
  return f"{step:08d}"


def _delete(folder: epath.Path) -> None:
  (folder / MANIFEST).unlink(missing_ok=True)
  folder.rmtree()


def _without_none(state: TrainState) -> dict[str, Any]:
  return {name: leaf for name, leaf in state._asdict().items() if leaf is not None}
