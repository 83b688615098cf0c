"""jaxlm's own folder of a model: a spec, Orbax arrays, tokenizer files, a manifest.

    model.json     the spec, the family and the dtype
    arrays/params/ Orbax
    manifest.json  size and hash of every other file

A run's workdir can be opened in its place: the newest whole checkpoint is used, and of
it the average of the parameters where the run keeps one.
"""

import dataclasses
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxlm import config, files
from jaxlm.errors import InputError
from jaxlm.interop.stream import Plan
from jaxlm.models.spec import LM
from jaxlm.shapes import PyTree
from jaxlm.training import checkpoints

MODEL = "model.json"
CHECKPOINTS = "checkpoints"
FAMILY = "family"
"""In a run's workdir: what the model that it started from is called."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
  """What model.json holds."""

  model: LM
  """The architecture."""
  family: str | None
  """What exports call it; None: whichever family can say it."""
  dtype: Literal["float32", "bfloat16"]
  """Dtype of the arrays."""


def is_one(folder: epath.Path) -> bool:
  """Says whether a folder is a model's own or a run's workdir."""
  if (folder / MODEL).exists():
    return True
  run = folder / "config.json"
  return (folder / CHECKPOINTS).exists() and '"jaxlm.runs.' in run.read_text()[:200]


def describe(folder: epath.Path) -> Description:
  """Returns the description of a model's folder or of a run's workdir.

  Raises:
    InputError: the file is not one of this version.
  """
  file = folder / (MODEL if (folder / MODEL).exists() else "config.json")
  try:
    read: Any = config.from_json(file.read_text(), defaults=True)
    if isinstance(read, Description):
      return read
    name = (folder / FAMILY).read_text() if (folder / FAMILY).exists() else None
    return Description(model=read.model, family=name, dtype=read.precision.params)
  except (InputError, ValueError, AttributeError, OSError) as error:
    raise InputError(f"{file}: not a model's description: {error}") from error


def save(folder: epath.Path, description: Description, params: PyTree) -> None:
  """Writes everything but the tokenizer into a folder; `seal` ends it."""
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
    items = ocp.args.Composite(params=ocp.args.StandardSave(params))
    orbax.save(folder / checkpoints.ARRAYS, items)
  files.write_atomic(folder / MODEL, config.to_json(description))


def seal(folder: epath.Path) -> None:
  """Writes the manifest: from now on the folder counts as whole."""
  checkpoints.write_manifest(folder)


def place_of(folder: epath.Path) -> epath.Path:
  """Returns where the arrays are: the folder itself, or a run's newest whole step.

  Raises:
    InputError: none is whole.
  """
  if (folder / MODEL).exists():
    if not (folder / checkpoints.MANIFEST).exists():
      raise InputError(
        f"{folder}: has no {checkpoints.MANIFEST}, so it was not written to its end."
      )
    steps = [folder]
  else:
    inside = folder / CHECKPOINTS
    found = reversed(checkpoints.steps_in(inside))
    steps = [inside / checkpoints.folder_name(step) for step in found]
  broken = []
  for place in steps:
    wrong = checkpoints.verify(place)
    if not wrong:
      for line in broken:
        print(f"NOT USED, DAMAGED: {line}")
      return place
    broken.append(f"{place}: {wrong}")
  raise InputError(
    f"{folder}: holds no whole checkpoint" + "".join(f"; {b}" for b in broken)
  )


def restore(folder: epath.Path, plan: Plan) -> PyTree:
  """Returns the parameters, each made straight in its sharding.

  Raises:
    InputError: the files are damaged, or hold another model.
  """
  place = place_of(folder)
  target = jax.tree.map(
    lambda shape, sharding: jax.ShapeDtypeStruct(
      shape.shape, shape.dtype, sharding=sharding
    ),
    plan.shapes,
    plan.shardings,
  )
  checkpoints.check_same_model(place, target)
  averaged = not (folder / MODEL).exists() and run_of(folder).ema is not None
  if averaged:
    print(f"{place}: the average of the parameters is used, as in its evaluations")
  return restore_arrays(place, target, averaged=averaged)


def restore_arrays(place: epath.Path, target: PyTree, *, averaged: bool) -> PyTree:
  """Returns the parameters of a checkpoint's folder, or the average that it keeps.

  `target` holds a ShapeDtypeStruct with its sharding for each.
  """
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as orbax:
    if averaged:
      item = {"ema": target}
      restore_args = ocp.checkpoint_utils.construct_restore_args(item)
      args = ocp.args.PyTreeRestore(
        item, restore_args=restore_args, partial_restore=True
      )
      read = orbax.restore(place / checkpoints.ARRAYS, ocp.args.Composite(rest=args))
      return read["rest"]["ema"]
    args = ocp.args.StandardRestore(target)
    read = orbax.restore(place / checkpoints.ARRAYS, ocp.args.Composite(params=args))
    return read["params"]


def run_of(folder: epath.Path) -> Any:
  """Returns the config of the run whose workdir this is."""
  return config.from_json((folder / "config.json").read_text(), defaults=True)
