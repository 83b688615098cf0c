"""Several processes as one: who speaks, what one does first, what all must agree on.

Every function here is called by all processes in the same order, or by none.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.errors import InputError
from jaxlm.shapes import Array

T = TypeVar("T")
PATIENCE = 1800
"""Seconds that a process waits for the others, who may compile or read longer."""


def alone() -> bool:
  """Says whether this run has one process."""
  return jax.process_count() == 1


def first() -> bool:
  """Says whether this is the process that prints and writes."""
  return jax.process_index() == 0


@contextlib.contextmanager
def first_speaks() -> Iterator[None]:
  """Sends what the other processes print nowhere; their errors are still seen."""
  if first():
    yield
    return
  with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    yield


def meet(place: str) -> None:
  """Waits until every process is at this place.

  The first collective gives a process 30 seconds only, and one may compile for longer.
  """
  if not alone():
    ocp.multihost.sync_global_processes(place, timeout=PATIENCE)


def from_first(number: int) -> int:
  """Returns the first process's number on all of them."""
  if alone():
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def lead(task: str, do: Callable[[], T]) -> T | None:
  """Lets the first process do something while the others wait; they get None.

  Raises:
    InputError: on every process, where it failed on the first.
  """
  if alone():
    return do()
  result, failure = None, None
  if first():
    try:
      result = do()
    except Exception as error:
      failure = error
  meet(task)
  failed = from_first(int(failure is not None))
  if failure is not None:
    raise failure
  if failed:
    raise InputError(f"{task}: failed on process 0, which says why.")
  return result


def require_same(field: str, value: str) -> None:
  """Raises InputError on every process where a value is not the same on all."""
  if alone():
    return
  digest = np.frombuffer(hashlib.sha256(value.encode()).digest()[:8], np.int32)
  found = multihost_utils.process_allgather(digest)
  other = [i for i, row in enumerate(found) if (row != found[0]).any()]
  if other:
    raise InputError(
      f"{field}: processes {other} have something else than process 0. Give every "
      "process the same config and the same files."
    )


class Vote:
  """Whether any process wants to stop; all learn it at the same step."""

  def __init__(self, mesh: jax.sharding.Mesh):
    """Every process of the mesh must vote at every step."""
    axes = mesh.axis_names
    self._votes = NamedSharding(mesh, PartitionSpec(axes))
    self._size = mesh.size
    whole = NamedSharding(mesh, PartitionSpec())
    self._largest = jax.jit(lambda votes: votes.max(), out_shardings=whole)
    self._cast: Array | None = None

  def __call__(self, yes: bool) -> bool:
    """Votes; returns the vote itself where one process is alone, else the last count.

    That one is a step old, so that no process waits for this step to end.
    """
    if alone():
      return yes
    counted = self._cast is not None and bool(self._cast)
    mine = jax.make_array_from_callback(
      (self._size,), self._votes, lambda index: np.full(1, yes, np.int32)
    )
    self._cast = self._largest(mine)
    return counted
