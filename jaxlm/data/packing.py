"""Documents into rows of fixed length, and rows into training examples.

A row holds T + 1 tokens, so that T inputs have T targets. A document longer than a row
is cut into pieces that overlap by one token: the last of a piece is its last target
and the next piece's first input. So every token but a document's first is predicted
exactly once. Pieces share rows by best fit decreasing (Johnson 1973).
"""

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np

PADDING = 0
"""The token, and the segment, where a row is empty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Which tokens go where: one entry a piece, [pieces], ordered by row and offset."""

  document: np.ndarray
  """Index of the document."""
  start: np.ndarray
  """Where the piece starts in its document."""
  length: np.ndarray
  """Tokens of the piece, 2 to T + 1."""
  row: np.ndarray
  """Row the piece goes to."""
  offset: np.ndarray
  """Where the piece starts in its row."""
  segment: np.ndarray
  """Its number in its row, from 1."""

  @property
  def rows(self) -> int:
    """Number of rows."""
    return int(self.row[-1]) + 1 if len(self.row) else 0


def plan(lengths: np.ndarray, seq_len: int, most: int | None = None) -> Plan:
  """Plans the rows of documents of these lengths in tokens, [documents].

  Where `most` is given, a row takes at most so many pieces and leaves its last place
  empty, so that each token is also an input.
  Documents of fewer than two tokens hold nothing to predict and are left out. Time is
  O(n log n) in the pieces; equal lengths keep their order, so the plan is one function
  of its arguments.
  """
  room = seq_len + 1 if most is None else seq_len
  document, start, length = _cut(np.asarray(lengths, np.int64), seq_len)
  order = np.argsort(-length, kind="stable")
  row, offset, segment = _best_fit(length[order].tolist(), room, most)
  placed = np.lexsort((offset, row))
  order = order[placed]
  return Plan(
    document=document[order],
    start=start[order],
    length=length[order],
    row=row[placed],
    offset=offset[placed],
    segment=segment[placed],
  )


def _cut(
  lengths: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns document, start and length of each piece, [pieces]."""
  targets = np.maximum(lengths - 1, 0)
  pieces = -(-targets // seq_len)
  document = np.repeat(np.arange(len(lengths)), pieces)
  first = np.cumsum(pieces) - pieces
  start = (np.arange(len(document)) - first[document]) * seq_len
  return document, start, np.minimum(lengths[document] - start, seq_len + 1)


def _best_fit(
  lengths: list[int], capacity: int, most: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Places lengths, longest first, each in the fullest row that still takes it.

  Returns row, offset and segment of each length, [pieces].
  """
  row, offset, segment = (np.zeros(len(lengths), np.int64) for _ in range(3))
  rows_by_room: dict[int, list[int]] = {}
  rooms: list[int] = []  # the keys of rows_by_room, sorted
  counts: list[int] = []  # pieces of each row
  for piece, length in enumerate(lengths):
    index = bisect.bisect_left(rooms, length)
    if index == len(rooms):
      room, chosen = capacity, len(counts)
      counts.append(0)
    else:
      room = rooms[index]
      chosen = rows_by_room[room].pop()
      if not rows_by_room[room]:
        del rows_by_room[room], rooms[index]
    counts[chosen] += 1
    row[piece], offset[piece] = chosen, capacity - room
    segment[piece] = counts[chosen]
    left = room - length
    if left and counts[chosen] != most:
      if left not in rows_by_room:
        rows_by_room[left] = []
        bisect.insort(rooms, left)
      rows_by_room[left].append(chosen)
  return row, offset, segment


def rows(
  plan: Plan,
  document: Callable[[int], Mapping[str, np.ndarray]],
  dtypes: Mapping[str, np.dtype],
  *,
  seq_len: int,
  block: int,
  sequences: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the fields of a plan's rows and their segments, [up to `block`, T + 1].

  `document(i)` returns document i's fields, [tokens], each of its own of `dtypes`; the
  field `part` is not kept: it says which of the document's `sequences` a token belongs
  to, from 0, and each gets a segment of its own.
  """
  for first in range(0, plan.rows, block):
    shape = (min(block, plan.rows - first), seq_len + 1)
    out = {name: np.zeros(shape, dtype) for name, dtype in dtypes.items()}
    out["segments"] = np.full(shape, PADDING, np.int64)
    begin, end = np.searchsorted(plan.row, [first, first + block])
    for piece in range(begin, end):
      start, length = plan.start[piece], plan.length[piece]
      offset = plan.offset[piece]
      place = plan.row[piece] - first, slice(offset, offset + length)
      fields = document(plan.document[piece])
      for name in dtypes:
        out[name][place] = fields[name][start : start + length]
      before = sequences * (plan.segment[piece] - 1)
      part = fields["part"][start : start + length] if "part" in fields else 0
      out["segments"][place] = before + part + 1
    yield out


def examples(
  tokens_BT: np.ndarray,
  segments_BT: np.ndarray,
  extras: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
  """Returns training examples of packed rows.

  Args:
    tokens_BT: [B, T + 1], as `rows` yields them.
    segments_BT: [B, T + 1]; 1, 2, ... along a row, 0 where it is empty.
    extras: further fields, [B, T + 1]: `weights` of tokens as targets; others belong
      to tokens as inputs.

  Returns:
    tokens, targets, segments, positions int32 and weights float32, all [B, T], and the
    extras. Positions count from each segment's first token. A weight is 1, or the
    target's own, where the target goes on with its input's segment, else 0.
  """
  extras = extras or {}
  inputs_BT, after_BT = segments_BT[:, :-1], segments_BT[:, 1:]
  index_BT = np.broadcast_to(np.arange(inputs_BT.shape[1]), inputs_BT.shape)
  begins_BT = np.ones(inputs_BT.shape, bool)
  begins_BT[:, 1:] = inputs_BT[:, 1:] != inputs_BT[:, :-1]
  first_BT = np.maximum.accumulate(np.where(begins_BT, index_BT, 0), axis=1)
  same_BT = (inputs_BT == after_BT) & (after_BT != PADDING)
  weights_BT = same_BT.astype(np.float32)
  if "weights" in extras:
    weights_BT *= extras["weights"][:, 1:]
  batch = {
    "tokens": tokens_BT[:, :-1].astype(np.int32),
    "targets": tokens_BT[:, 1:].astype(np.int32),
    "segments": inputs_BT.astype(np.int32),
    "positions": (index_BT - first_BT).astype(np.int32),
    "weights": weights_BT,
  }
  for name in extras.keys() - {"weights"}:
    batch[name] = np.ascontiguousarray(extras[name][:, :-1])
  return batch
