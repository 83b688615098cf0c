"""Batches by address: batch b, row r is example b B + r of the global order.

Whatever the number of processes, that is so; and the loader's whole state is the
number of the next step, which is also where it can be told to start.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from jaxlm.data import mixture, packing
from jaxlm.data.corpus import Corpus
from jaxlm.data.rows import Rows
from jaxlm.data.spec import Data
from jaxlm.errors import InputError

Batch = dict[str, np.ndarray]


class Loader:
  """Endless batches of the rows that this process holds, made ahead by threads.

  Iterating gives what `packing.examples` returns, [len(rows), T]. `step` is the number
  of the next batch: save it, and give it back as `start`, at no cost in time. Close it,
  or use it as a context, to end the threads.
  """

  def __init__(self, corpus: Corpus, data: Data, *, rows: Sequence[int], start: int):
    """Starts at the batch of step `start`, with these of its rows 0 to batch - 1.

    Raises:
      InputError: a row or the step is out of range.
    """
    _check_rows(rows, data.batch)
    if start < 0:
      raise InputError(f"start: {start} is not a step, which is at least 0.")
    examples: Any = mixture.mix(corpus.train, corpus.weights, data.seed)

    def local_batch(step: int) -> Batch:
      return _stack([examples[step * data.batch + row] for row in rows])

    options = grain.ReadOptions(
      num_threads=data.threads, prefetch_buffer_size=data.prefetch
    )
    steps = grain.MapDataset.range(start, sys.maxsize).map(local_batch)
    self._batches = iter(steps.to_iter_dataset(options))
    self.step = start

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    batch = next(self._batches)
    self.step += 1
    return batch

  def close(self) -> None:
    """Ends the threads."""
    self._batches.close()

  def __enter__(self) -> "Loader":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def in_order(
  sources: Sequence[Rows], batch: int, *, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
  """Yields all rows once, source by source, in an order that never changes.

  Args:
    sources: rows of a corpus; its held-out ones, say.
    batch: rows of a batch over all processes.
    rows: those that this process holds; None: all.

  The last batch is filled up with empty rows, whose weights are 0, so every batch has
  one shape and every token counts exactly once.
  """
  rows = range(batch) if rows is None else rows
  _check_rows(rows, batch)
  places = [(source, i) for source in sources for i in range(len(source))]

  def row_at(index: int) -> dict[str, np.ndarray]:
    source, i = places[min(index, len(places) - 1)]
    if index < len(places):
      return source[i]
    return {name: np.zeros_like(values) for name, values in source[i].items()}

  for first in range(0, len(places), batch):
    yield _stack([row_at(first + row) for row in rows])


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
  fields = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  return packing.examples(fields.pop("tokens"), fields.pop("segments"), fields)


def _check_rows(rows: Sequence[int], batch: int) -> None:
  if not len(rows) or min(rows) < 0 or max(rows) >= batch:
    raise InputError(f"rows: {list(rows)} are not rows of a batch of {batch}.")
