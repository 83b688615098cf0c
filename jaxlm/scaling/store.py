"""The rows of a sweep on disk: one file a run, named by the hash of its config.

A file is written whole or not at all, so a sweep that is killed has the rows of the
runs that ended, and several programs can write into one folder.
"""

import json
import re
from typing import Any

from etils import epath

from jaxlm import files
from jaxlm.errors import InputError

Row = dict[str, Any]
KEY = re.compile(r"[0-9a-f]{16}")


class Store:
  """A folder of rows."""

  def __init__(self, folder: files.Pathlike):
    """The folder is made with the first row."""
    self.folder: epath.Path = files.absolute(folder)

  def rows(self) -> list[Row]:
    """Returns all rows, the smallest compute first.

    Raises:
      InputError: a file is no row.
    """
    if not self.folder.exists():
      return []
    found = [self._read(place) for place in self.folder.glob("*.json")]
    return sorted(found, key=lambda row: (row["flops"]["causal"], row["key"]))

  def __contains__(self, key: str) -> bool:
    """Whether the run has ended."""
    return self._place(key).exists()

  def row(self, key: str) -> Row | None:
    """Returns the row of a run; None: it has not ended.

    Raises:
      InputError: the file is no row.
    """
    place = self._place(key)
    return self._read(place) if place.exists() else None

  def add(self, key: str, row: Row) -> None:
    """Keeps the row of a run that ended."""
    self.folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"key": key} | row, indent=1, allow_nan=False)
    files.write_atomic(self._place(key), text + "\n")

  def _place(self, key: str) -> epath.Path:
    if not KEY.fullmatch(key):
      raise InputError(f"key: {key!r} is not 16 hexadecimal digits.")
    return self.folder / f"{key}.json"

  def _read(self, place: epath.Path) -> Row:
    try:
      row = json.loads(place.read_text())
    except json.JSONDecodeError as error:
      raise InputError(
        f"{place}: not a row ({error}). Delete it, and its run is done again."
      ) from error
    if not (isinstance(row, dict) and row.get("key") == place.stem and "flops" in row):
      raise InputError(
        f"{place}: not a row of run {place.stem}. Delete it, and its run is done again."
      )
    return row
