"""Packed rows in files: written once, document by document, then mapped into memory."""

import array
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxlm.data import packing
from jaxlm.data.report import Counts

_BLOCK_ROWS = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """Packed rows; row i is a pair of [T + 1] arrays, tokens and segments."""

  tokens_NT: np.ndarray
  """Token ids, [rows, T + 1]."""
  segments_NT: np.ndarray
  """Number of the piece in its row from 1, 0 where the row is empty, [rows, T + 1]."""

  def __len__(self) -> int:
    return len(self.tokens_NT)

  def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    return self.tokens_NT[index], self.segments_NT[index]


class Writer:
  """Takes documents, keeps their tokens in a file, packs them at the end."""

  def __init__(self, stem: Path, dtype: np.dtype):
    """Starts the files `stem`.*, with token ids of this type."""
    self._stem = stem
    self._dtype = dtype
    self._flat = stem.with_name(f"{stem.name}.flat")
    self._stream = self._flat.open("wb")
    self._lengths = array.array("q")
    self._bytes = 0

  def append(self, tokens: Sequence[int], size: int) -> None:
    """Adds a document: its tokens, bos and eos included, and its UTF-8 bytes."""
    self._stream.write(np.array(tokens, self._dtype).tobytes())
    self._lengths.append(len(tokens))
    self._bytes += size

  def close(self) -> None:
    """Ends the writing of documents."""
    self._stream.close()

  def pack(self, seq_len: int) -> Counts:
    """Writes the rows that `load` reads, and removes the documents' own file."""
    self.close()
    lengths = np.array(self._lengths, np.int64)
    stops = np.cumsum(lengths)
    flat = np.memmap(self._flat, self._dtype, "r") if len(lengths) else np.zeros(0)
    plan = packing.plan(lengths, seq_len)
    blocks = packing.rows(
      plan,
      lambda index: flat[stops[index] - lengths[index] : stops[index]],
      seq_len=seq_len,
      block=_BLOCK_ROWS,
    )
    shape = (plan.rows, seq_len + 1)
    dtype = np.min_scalar_type(int(plan.segment.max(initial=0)))
    tokens, segments = _files(self._stem)
    with (
      _npy(tokens, self._dtype, shape) as write_tokens,
      _npy(segments, dtype, shape) as write_segments,
    ):
      for tokens_NT, segments_NT in blocks:
        write_tokens(tokens_NT)
        write_segments(segments_NT)
    self._flat.unlink()
    return Counts(
      documents=len(lengths),
      bytes=self._bytes,
      tokens=int((lengths - 1).sum()),
      rows=plan.rows,
    )


def load(stem: Path, count: int, seq_len: int) -> Rows:
  """Maps the rows that `Writer.pack` wrote.

  Raises:
    OSError, ValueError: the files are missing, broken, or not `count` rows of
      `seq_len` + 1.
  """
  tokens_NT, segments_NT = (
    np.load(file, mmap_mode="r", allow_pickle=False) for file in _files(stem)
  )
  shape = (count, seq_len + 1)
  if not tokens_NT.shape == segments_NT.shape == shape:
    raise ValueError(f"{stem} has rows of shape {tokens_NT.shape}, not {shape}")
  return Rows(tokens_NT=tokens_NT, segments_NT=segments_NT)


def _files(stem: Path) -> tuple[Path, Path]:
  return (
    stem.with_name(f"{stem.name}.tokens.npy"),
    stem.with_name(f"{stem.name}.segments.npy"),
  )


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
