"""A run's state and frozen parameters, as it begins or goes on."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from etils import epath

from jaxlm import files
from jaxlm.posttrain.distill import TEACHER
from jaxlm.runs import reference
from jaxlm.runs.assembled import Assembled
from jaxlm.runs.inputs import Inputs, check_same
from jaxlm.shapes import PyTree
from jaxlm.training.checkpoints import Restored
from jaxlm.training.objective import BASE
from jaxlm.training.state import TrainState

if TYPE_CHECKING:
  from jaxlm.runs.train import Train


class Begun(NamedTuple):
  """What the first step takes."""

  state: TrainState
  frozen: dict[str, PyTree]
  """Parameters that do not train, by the names of the task's."""
  told: dict[str, str]
  """Hashes that checkpoints keep: of the rows, and of the base."""
  first: Callable[[], PyTree]
  """Gives the model as it was before the first step."""


def begin(
  run: "Train",
  parts: Assembled,
  inputs: Inputs,
  restored: Restored | None,
  workdir: epath.Path,
) -> Begun:
  """Loads what a checkpoint does not hold.

  Raises:
    InputError: a checkpoint is of other rows or another base, or the teacher is another
      than the recorded one.
  """
  make = _begin_whole if parts.base is None else _begin_beside
  begun = make(run, parts, inputs, restored)
  wanted = {part.name for part in parts.task.frozen}
  if TEACHER in wanted and parts.teacher is not None:
    weights = parts.teacher.load()
    found = reference.fingerprint(parts.teacher.decoder, weights)
    reference.record("teacher", workdir, found, resumed=restored is not None)
    begun.frozen[TEACHER] = weights
  return begun


def _begin_whole(
  run: "Train", parts: Assembled, inputs: Inputs, restored: Restored | None
) -> Begun:
  told = {"corpus": inputs.corpus.fingerprint}

  def fresh() -> TrainState:
    return parts.first_state(inputs.weights(parts.decoder, run.seed))

  if restored is None:
    state = fresh()
    return Begun(state, {}, told, lambda: state.params)
  check_same(restored, told, run.data)
  return Begun(restored.state, {}, told, lambda: fresh().params)


def _begin_beside(
  run: "Train", parts: Assembled, inputs: Inputs, restored: Restored | None
) -> Begun:
  assert parts.base is not None
  weights = inputs.weights(parts.decoder, run.seed)
  assert inputs.opened is not None
  told = {
    "corpus": inputs.corpus.fingerprint,
    "base": inputs.opened.identity(parts.decoder.layout, weights),
    "initial": files.absolute(inputs.opened.place).as_posix(),
  }
  print(f"base: frozen, weights {told['base']}")
  if restored is not None:
    check_same(restored, told, run.data)
  moved = parts.base.tuning.prepare is not None
  trained = None
  if restored is None or (moved and parts.task.fields):
    trained = parts.first_state(weights)
  frozen = {BASE: parts.base.freeze(weights)}
  state = restored.state if restored is not None else trained
  assert state is not None

  def first() -> PyTree:
    # Where a method changes the base, its first adapters give back what is missing.
    if moved and trained is not None:
      return parts.whole(trained.params, frozen)
    return frozen[BASE]

  return Begun(state, frozen, told, first)
