"""What an objective wants to know of a frozen model, put beside the rows."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath

from jaxlm.data.corpus import Corpus
from jaxlm.data.spec import Data
from jaxlm.posttrain import distill, objectives
from jaxlm.runs import reference
from jaxlm.runs.assembled import Assembled
from jaxlm.shapes import PyTree
from jaxlm.sharding.placement import placer, rows_here
from jaxlm.sharding.rules import Layout
from jaxlm.training.objective import Batch

if TYPE_CHECKING:
  from jaxlm.runs.train import Train


class Placement(NamedTuple):
  """Which rows of a batch this process makes, and what puts them on the mesh."""

  rows: list[int]
  put: Callable[[dict[str, np.ndarray]], Batch]

  @classmethod
  def of(cls, layout: Layout, data: Data) -> "Placement":
    """Returns the placement of batches by the layout's rules."""
    sharding = layout.sharding("batch", "sequence")
    shape = (data.batch, data.seq_len)
    return cls(rows_here(sharding, shape), placer(sharding, shape))

  def beside(self, frozen: dict[str, PyTree]) -> "Placement":
    """Returns a placement whose batches hold these parameters too."""
    if not frozen:
      return self
    return self._replace(put=lambda rows: self.put(rows) | {"frozen": frozen})


class Place(NamedTuple):
  """Where a run is: its folder, its batches, and whether it goes on."""

  workdir: epath.Path
  batches: Placement
  resumed: bool


def with_fields(
  run: "Train",
  parts: Assembled,
  corpus: Corpus,
  place: Place,
  first: Callable[[], PyTree],
) -> Corpus:
  """Returns the corpus with the objective's fields in its rows.

  `first` gives the model's parameters as they were before the first step.

  Raises:
    InputError: stored fields are damaged, or of other weights.
  """
  spec, decoder = run.objective, parts.decoder
  if not parts.task.fields:
    return corpus
  pass_over = partial(
    reference.Reference,
    fields=parts.task.fields,
    batch=run.data.batch,
    here=place.batches.rows,
    put=place.batches.put,
  )
  if isinstance(spec, distill.Distill):
    assert parts.teacher is not None
    teacher, first = parts.teacher.decoder, parts.teacher.load
    asked = pass_over(
      what="teacher",
      decoder=teacher,
      score=partial(distill.top_log_probs, spec, teacher),
      options=f"top {spec.top_k} at {spec.divergence.temperature}",
    )
  else:
    asked = pass_over(
      what="reference",
      decoder=decoder,
      score=partial(objectives.reference, decoder, objectives.chunk_of(spec)),
      options="",
    )
  return reference.attach(asked, corpus, place.workdir, first, resumed=place.resumed)
