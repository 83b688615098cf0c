"""Packed rows in files: written once, document by document, then mapped into memory."""

import array
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from jaxlm.data import packing
from jaxlm.data.report import Counts

_BLOCK_ROWS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """Packed rows; row i is a dict of [T + 1] arrays."""

  tokens_NT: np.ndarray
  """Token ids, [rows, T + 1]."""
  segments_NT: np.ndarray
  """Number of the sequence in its row from 1, 0 where it is empty, [rows, T + 1]."""
  extras: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  """Further fields, [rows, T + 1, ...], as `packing.examples` takes them."""

  def __len__(self) -> int:
    return len(self.tokens_NT)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    extras = {name: values[index] for name, values in self.extras.items()}
    return extras | {
      "tokens": self.tokens_NT[index],
      "segments": self.segments_NT[index],
    }


class Writer:
  """Takes documents, keeps their fields in files, packs them at the end."""

  def __init__(self, stem: Path, dtypes: Mapping[str, np.dtype]):
    """Starts the files `stem`.*, one for each field; `tokens` is one of them."""
    self._stem = stem
    self._dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
    self._streams = {name: self._flat(name).open("wb") for name in dtypes}
    self._lengths = array.array("q")
    self._bytes = self._predicted = 0

  def _flat(self, name: str) -> Path:
    return self._stem.with_name(f"{self._stem.name}.{name}.flat")

  def append(
    self, fields: Mapping[str, np.ndarray], *, size: int, predicted: int
  ) -> None:
    """Adds a document: its fields, [tokens], its UTF-8 bytes and predicted tokens."""
    for name, dtype in self._dtypes.items():
      self._streams[name].write(np.asarray(fields[name], dtype).tobytes())
    self._lengths.append(len(fields["tokens"]))
    self._bytes += size
    self._predicted += predicted

  @property
  def documents(self) -> int:
    """How many were taken."""
    return len(self._lengths)

  def close(self) -> None:
    """Ends the writing of documents."""
    for stream in self._streams.values():
      stream.close()

  def pack(
    self, seq_len: int, *, most: int | None, sequences: int, dropped: int
  ) -> Counts:
    """Writes the rows that `load` reads, and removes the documents' own files.

    `most` documents of `sequences` sequences share a row; `dropped` were left out.
    """
    self.close()
    lengths = np.array(self._lengths, np.int64)
    stops = np.cumsum(lengths)
    empty = not len(lengths)
    flat = {
      name: np.zeros(0) if empty else np.memmap(self._flat(name), dtype, "r")
      for name, dtype in self._dtypes.items()
    }

    def document(index: int) -> dict[str, np.ndarray]:
      span = slice(stops[index] - lengths[index], stops[index])
      return {name: values[span] for name, values in flat.items()}

    plan = packing.plan(lengths, seq_len, most)
    kept = {name: dtype for name, dtype in self._dtypes.items() if name != "part"}
    segments = sequences * int(plan.segment.max(initial=0))
    dtypes = kept | {"segments": np.min_scalar_type(segments)}
    blocks = packing.rows(
      plan, document, kept, seq_len=seq_len, block=_BLOCK_ROWS, sequences=sequences
    )
    with contextlib.ExitStack() as stack:
      writers = {
        name: stack.enter_context(
          _npy(_file(self._stem, name), dtype, (plan.rows, seq_len + 1))
        )
        for name, dtype in dtypes.items()
      }
      for block in blocks:
        for name, write in writers.items():
          write(block[name])
    for name in self._dtypes:
      self._flat(name).unlink()
    return Counts(
      documents=len(lengths),
      bytes=self._bytes,
      tokens=self._predicted,
      rows=plan.rows,
      dropped=dropped,
    )


def load(stem: Path, count: int, seq_len: int, extras: tuple[str, ...] = ()) -> Rows:
  """Maps the rows that `Writer.pack` wrote.

  Raises:
    OSError, ValueError: the files are missing, broken, or not `count` rows of
      `seq_len` + 1.
  """
  shape = (count, seq_len + 1)
  tokens_NT, segments_NT, *others = (
    load_field(stem, name, shape) for name in ("tokens", "segments", *extras)
  )
  return Rows(
    tokens_NT=tokens_NT,
    segments_NT=segments_NT,
    extras=dict(zip(extras, others, strict=True)),
  )


def load_field(stem: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Maps one field of rows; raises as `load` does."""
  values = np.load(_file(stem, name), mmap_mode="r", allow_pickle=False)
  if values.shape != shape:
    raise ValueError(f"{stem} has {name} of shape {values.shape}, not {shape}")
  return values


@contextlib.contextmanager
def write_field(
  stem: Path, name: str, dtype: np.dtype, shape: tuple[int, ...]
) -> Iterator[Callable[[np.ndarray], object]]:
  """Yields a function that appends rows to one more field, [rows, T + 1, ...]."""
  with _npy(_file(stem, name), dtype, shape) as write:
    yield write


def rename_field(stem: Path, name: str, to: str) -> None:
  """Gives a field that is whole its name."""
  _file(stem, name).replace(_file(stem, to))


def _file(stem: Path, name: str) -> Path:
  return stem.with_name(f"{stem.name}.{name}.npy")


@contextlib.contextmanager
def _npy(
  file: Path, dtype: np.dtype, shape: tuple[int, ...]
) -> Iterator[Callable[[np.ndarray], object]]:
  """Yields a function that appends blocks to a .npy file.

  Not a mapped file: a full disk would kill the process there instead of raising.
  """
  header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
  with file.open("wb") as stream:
    np.lib.format.write_array_header_1_0(stream, header)
    yield lambda block: stream.write(block.astype(dtype).tobytes())
