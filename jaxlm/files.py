"""Local and remote paths: reading, atomic writing, JSON lines, compression by suffix.

A path is local, remote (gs://bucket/x, with the extra `gcs`), or `jaxlm://x` for what
ships inside this package.
"""

import gzip
import json
import uuid
from collections.abc import Iterator
from typing import Any

import zstandard
from etils import epath

from jaxlm.errors import InputError

PACKAGE = "jaxlm://"
GLOB = "*?["
Pathlike = str | epath.Path


def path(name: Pathlike) -> epath.Path:
  """Returns a path object for a local, remote or packaged name."""
  if isinstance(name, str) and name.startswith(PACKAGE):
    return epath.Path(__file__).parent / name.removeprefix(PACKAGE)
  return epath.Path(name).expanduser()


def absolute(name: Pathlike) -> epath.Path:
  """Returns the path object of a name, from the root; remote ones already are."""
  place = path(name)
  return place if "://" in str(place) else place.absolute()


def require_local(place: epath.Path, field: str) -> None:
  """Raises InputError, which names `field`, where a path is remote."""
  if "://" in str(place):
    raise InputError(f"{field}={place}: is remote; give a local folder.")


def find(pattern: Pathlike, field: str) -> list[epath.Path]:
  """Returns the files that a path or a glob pattern names, sorted.

  Raises:
    InputError: none exists; the message names `field`.
  """
  place = path(pattern)
  fixed = place
  while any(mark in str(fixed) for mark in GLOB):
    fixed = fixed.parent
  if fixed == place:
    found = [place]
  else:
    found = sorted(fixed.glob(str(place.relative_to(fixed))))
  found = [file for file in found if file.exists() and not file.is_dir()]
  if not found:
    raise InputError(
      f"{field}: no file at {str(pattern)!r} (looked for {place}). Give an existing "
      f"file, a glob such as 'texts/*.txt.gz', gs://..., or {PACKAGE}corpora/..."
    )
  return found


def read_bytes(file: epath.Path) -> bytes:
  """Reads a file whole, decompressed where its name ends in .gz or .zst."""
  data = file.read_bytes()
  try:
    if file.suffix == ".gz":
      return gzip.decompress(data)
    if file.suffix == ".zst":
      return b"".join(_frames(data))
  except (OSError, EOFError, zstandard.ZstdError) as error:
    raise InputError(f"{file}: not a whole {file.suffix} file ({error})") from error
  return data


def _frames(data: bytes) -> Iterator[bytes]:
  """Yields the contents of each Zstandard frame; one that is cut off is an error."""
  while data:
    frame = zstandard.ZstdDecompressor().decompressobj()
    yield frame.decompress(data)
    if not frame.eof:
      raise EOFError("the last frame is cut off")
    data = frame.unused_data


def read_text(file: epath.Path) -> str:
  """Reads UTF-8 text.

  Raises:
    InputError: a byte that is not UTF-8, with its offset.
  """
  try:
    return read_bytes(file).decode("utf-8")
  except UnicodeDecodeError as error:
    raise InputError(
      f"{file}: byte {error.start} is not UTF-8 ({error.reason}). Convert the file "
      "first, for example with iconv -f latin1 -t utf-8."
    ) from error


def write_atomic(file: epath.Path, data: str | bytes) -> None:
  """Writes a file whole or not at all: a temporary neighbour, then a rename."""
  temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
  try:
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    temporary.replace(file)
  finally:
    temporary.unlink(missing_ok=True)


def read_jsonl(file: epath.Path) -> Iterator[tuple[int, Any]]:
  """Yields (line number from 1, value) of each line that is not blank.

  Raises:
    InputError: a line that is not JSON, with its number.
  """
  for number, line in enumerate(read_text(file).split("\n"), 1):
    if line.strip():
      try:
        yield number, json.loads(line)
      except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {number}: not JSON ({error})") from error
