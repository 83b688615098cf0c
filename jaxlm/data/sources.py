"""Where documents come from: text, JSON lines, ArrayRecord, files of token ids.

A path is local, gs://, or jaxlm:// for what ships with the package; it may be a glob;
.gz and .zst are read through. Each file is read whole into memory: keep a big corpus
in files of at most a few GB.
"""

import dataclasses
import io
import json
import re
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
from etils import epath

from jaxlm import files
from jaxlm.errors import InputError, nearest

RECORD_SUFFIX = ".arrayrecord"
_RECORDS = 256  # read at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
  """Plain text files in UTF-8."""

  path: str
  """A file or a glob such as gs://bucket/texts/*.txt.zst."""
  documents: Literal["file", "paragraphs", "lines"]
  """What is one document: a file, what stands between blank lines, or a line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jsonl:
  """Files with a JSON object a line, each one document."""

  path: str
  """A file or a glob such as texts/*.jsonl.gz."""
  field: str = "text"
  """The key of the text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecord:
  """ArrayRecord files, each record one document; local files only."""

  path: str
  """A file or a glob such as texts/*.arrayrecord."""
  field: str | None = None
  """The key of the text where records are JSON objects; None: they are the text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenIds:
  """Files of token ids that the run's own tokenizer made: raw .bin, or .npy."""

  path: str
  """A file or a glob such as tokens/*.bin."""
  dtype: Literal["uint16", "uint32", "int32"]
  """Type of an id, little-endian."""
  end: int
  """The id that stands between documents; it is cut away."""

  def __post_init__(self):
    if self.end < 0:
      raise InputError(f"data.sources.source.end: {self.end} is not a token id.")


Source = Text | Jsonl | ArrayRecord | TokenIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """One document, never empty."""

  where: str
  """Its file and place, for messages."""
  content: str | np.ndarray
  """Its text, or its token ids, [tokens]."""


class Located(Protocol):
  """A source of any kind."""

  @property
  def path(self) -> str:
    """A file or a glob."""
    ...


def find(source: Located, field: str) -> list[epath.Path]:
  """Returns the files of a source; `field` is where a config says it.

  Raises:
    InputError: there is none.
  """
  return files.find(source.path, f"{field}.path")


def read(source: Source, field: str, vocab: int) -> Iterator[Document]:
  """Yields the documents of a source that are not empty, in order.

  Args:
    source: what to read.
    field: where the config says it, for messages ("data.sources.0.source").
    vocab: the token ids of `TokenIds` must lie below.

  Raises:
    InputError: no file, no document, bytes that are not UTF-8, a row without the
      field, a token id that the vocabulary lacks; names the file and place.
  """
  found, empty = find(source, field), True
  for file in found:
    for document in _read_file(source, file, vocab):
      if len(document.content):
        empty = False
        yield document
  if empty:
    raise InputError(
      f"{field}.path: no document in {source.path} ({len(found)} files, all empty)."
    )


def _read_file(source: Source, file: epath.Path, vocab: int) -> Iterator[Document]:
  match source:
    case Text():
      return _read_text(source, file)
    case Jsonl():
      return _read_jsonl(source, file)
    case ArrayRecord():
      return _read_array_record(source, file)
    case TokenIds():
      return _read_token_ids(source, file, vocab)


def _read_text(source: Text, file: epath.Path) -> Iterator[Document]:
  text = files.read_text(file)
  match source.documents:
    case "file":
      yield Document(where=str(file), content=text)
    case "paragraphs":
      paragraphs = re.split(r"\r?\n(?:[ \t]*\r?\n)+", text.strip("\r\n"))
      for number, paragraph in enumerate(paragraphs, 1):
        yield Document(where=f"{file}, paragraph {number}", content=paragraph)
    case "lines":
      for number, line in enumerate(text.split("\n"), 1):
        yield Document(where=f"{file}, line {number}", content=line.rstrip("\r"))


def _read_jsonl(source: Jsonl, file: epath.Path) -> Iterator[Document]:
  for where, row in _lines(file):
    yield Document(where=where, content=_text_of(row, source.field, where))


def _read_array_record(source: ArrayRecord, file: epath.Path) -> Iterator[Document]:
  if source.field is None:
    for where, content in _records(file):
      yield Document(where=where, content=content)
  else:
    for where, row in _record_objects(file):
      yield Document(where=where, content=_text_of(row, source.field, where))


def objects(file: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (place for messages, JSON object) of each row of a file, in order.

  A file whose name ends in .arrayrecord has an object a record, any other one a line.

  Raises:
    InputError: not such a file, or a row that is not a JSON object; names the place.
  """
  return _record_objects(file) if file.suffix == RECORD_SUFFIX else _lines(file)


def _lines(file: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  for number, row in files.read_jsonl(file):
    where = f"{file}, line {number}"
    yield where, _object(row, where)


def _record_objects(file: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  for where, content in _records(file):
    try:
      row = json.loads(content)
    except json.JSONDecodeError as error:
      raise InputError(f"{where}: not JSON ({error})") from error
    yield where, _object(row, where)


def _object(row: Any, where: str) -> dict[str, Any]:
  if not isinstance(row, dict):
    raise InputError(f"{where}: a JSON object is needed, not a {type(row).__name__}")
  return row


def _records(file: epath.Path) -> Iterator[tuple[str, str]]:
  """Yields (place, text) of each record."""
  for number, record in enumerate(_read_records(file)):
    where = f"{file}, record {number}"
    yield where, _decode(record, where)


def _read_records(file: epath.Path) -> Iterator[bytes]:
  from array_record.python import (  # a compiled module without types
    array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
  )

  reader = array_record_module.ArrayRecordReader(str(file))
  try:
    count = reader.num_records()
    for first in range(0, count, _RECORDS):
      yield from reader.read(first, min(count, first + _RECORDS))
    reader.close()  # where a file is broken from its start, this tells
  except (RuntimeError, IndexError) as error:
    raise InputError(f"{file}: not a whole ArrayRecord file ({error})") from error


def _decode(data: bytes, where: str) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise InputError(
      f"{where}: byte {error.start} is not UTF-8 ({error.reason})"
    ) from error


def _text_of(row: dict[str, Any], field: str, where: str) -> str:
  """Returns the text of a JSON object."""
  if field not in row:
    keys = ", ".join(map(repr, row)) or "none"
    raise InputError(
      f"{where}: no field {field!r}; the row has {keys}.{nearest(field, row)}"
    )
  return require_text(row[field], field, where)


def require_text(text: Any, field: str, where: str) -> str:
  """Returns a value of a row that must be text, and text that UTF-8 can hold.

  Raises:
    InputError: it is not; names the place and the field.
  """
  if not isinstance(text, str):
    raise InputError(
      f"{where}: the field {field!r} is a {type(text).__name__}, not text"
    )
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise InputError(
      f"{where}: letter {error.start} of {field!r} is half of a surrogate pair "
      f"({text[error.start]!r}), which no UTF-8 text can hold"
    ) from error
  return text


def _read_token_ids(
  source: TokenIds, file: epath.Path, vocab: int
) -> Iterator[Document]:
  ids = _load_ids(source, file)
  wrong = np.flatnonzero((ids != source.end) & ((ids < 0) | (ids >= vocab)))
  if len(wrong):
    raise InputError(
      f"{file}, token {wrong[0]}: the id {ids[wrong[0]]} is not in the tokenizer's "
      f"vocabulary of {vocab}. Give the tokenizer that made the file, and its dtype "
      f"({source.dtype} was read)."
    )
  ends = np.flatnonzero(ids == source.end)
  starts = np.concatenate([[0], ends + 1])
  for start, stop in zip(starts, [*ends, len(ids)], strict=True):
    yield Document(where=f"{file}, token {start}", content=ids[start:stop])


def _load_ids(source: TokenIds, file: epath.Path) -> np.ndarray:
  data = files.read_bytes(file)
  dtype = np.dtype(source.dtype).newbyteorder("<")
  if ".npy" in file.suffixes:
    try:
      ids = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
      raise InputError(f"{file}: not a .npy file of numbers ({error})") from error
    if ids.dtype != dtype or ids.ndim != 1:
      raise InputError(
        f"{file}: holds {ids.dtype} of shape {ids.shape}; {source.dtype} of one "
        "dimension is told by the source's dtype"
      )
    return ids
  if len(data) % dtype.itemsize:
    raise InputError(
      f"{file}: {len(data)} bytes are not a whole number of {source.dtype} ids"
    )
  return np.frombuffer(data, dtype)
