"""Rename tables: which tensor of a file is which parameter, axis by axis.

A table is a tuple of rows, read in both directions:

    row("mixer/q", "model.layers.{i}.self_attn.q_proj.weight", "(H K) D -> D H K")

says that the parameter `q` of block i's mixer, with axes D H K, stands in that tensor
with H and K as one axis, D behind. The letters are those of `shapes.py`, and their
sizes come from the model. A row for what a model does not have is passed over; a
parameter without a row, or a tensor without one, is an error.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import einops
import numpy as np

from jaxlm.errors import InputError, nearest
from jaxlm.models import spec as specs

Sizes = dict[str, int]
TWO = 2
"""The size of the letter Z: the two halves of a rotated pair."""


class Part(NamedTuple):
  """One parameter's part in a tensor."""

  ours: str
  """Name inside the block where the tensor's name has {i}, else the whole name."""
  pattern: str
  """einops: the part's axes in the file -> the parameter's axes."""


class Row(NamedTuple):
  """One tensor of a file."""

  theirs: str
  """Its name; {i} stands for the block's number."""
  parts: tuple[Part, ...]
  """The parameters in it."""
  axis: int = 0
  """Where there are several: the axis along which they follow each other."""
  view: str | None = None
  """einops: how the file's axes are split first, with the letter c for the parts."""
  shift: float = 0.0
  """The file holds the parameter plus this."""


Table = tuple[Row, ...]


def row(ours: str, theirs: str, pattern: str, *, shift: float = 0.0) -> Row:
  """Returns the row of a tensor that holds one parameter."""
  return Row(theirs, (Part(ours, pattern),), shift=shift)


def fused(
  theirs: str, parts: Mapping[str, str], *, axis: int, view: str | None = None
) -> Row:
  """Returns the row of a tensor that holds several parameters along an axis."""
  named = tuple(Part(*item) for item in parts.items())
  return Row(theirs, named, axis, view)


def layer_norm(ours: str, theirs: str) -> Table:
  """Returns the rows of a LayerNorm's scale and bias."""
  return (
    row(f"{ours}/scale", f"{theirs}.weight", "D"),
    row(f"{ours}/bias", f"{theirs}.bias", "D"),
  )


class Piece(NamedTuple):
  """One parameter, or one layer of a stacked one."""

  name: str
  """The parameter, such as layers/0/mixer/q."""
  layer: int | None
  """Its place in the stack that a scan runs over; None: not stacked."""


class Entry(NamedTuple):
  """One tensor of a file for a certain model."""

  name: str
  pieces: tuple[Piece, ...]
  row: Row
  sizes: Sizes

  @property
  def shape(self) -> tuple[int, ...]:
    """The tensor's shape in the file."""
    shape = list(self._part_shapes()[0])
    shape[self.row.axis] = sum(s[self.row.axis] for s in self._part_shapes())
    if self.row.view is None:
      return tuple(shape)
    _, after = self.row.view.split("->")
    known = dict(zip(after.split(), shape, strict=True))
    return _shape(_axes(self.row.view.split("->")[0]), known)

  def _part_shapes(self) -> list[tuple[int, ...]]:
    return [
      _shape(_axes(part.pattern.split("->")[0]), self.sizes) for part in self.row.parts
    ]

  def split(self, tensor: np.ndarray) -> dict[Piece, np.ndarray]:
    """Returns views of a tensor as the parameters that it holds."""
    if self.row.view is not None:
      tensor = _rearrange(tensor, self.row.view, self.sizes)
    widths = [shape[self.row.axis] for shape in self._part_shapes()]
    places = np.cumsum(widths)[:-1].tolist()
    found = np.split(tensor, places, axis=self.row.axis)
    return {
      piece: _rearrange(array, part.pattern, self.sizes)
      for piece, part, array in zip(self.pieces, self.row.parts, found, strict=True)
    }

  def join(self, arrays: Mapping[Piece, np.ndarray]) -> np.ndarray:
    """Returns the tensor that `split` takes apart."""
    found = [
      _rearrange(arrays[piece], _back(part.pattern), self.sizes)
      for piece, part in zip(self.pieces, self.row.parts, strict=True)
    ]
    joined = found[0] if len(found) == 1 else np.concatenate(found, self.row.axis)
    if self.row.view is not None:
      joined = _rearrange(joined, _back(self.row.view), self.sizes)
    return np.ascontiguousarray(joined)


def _back(pattern: str) -> str:
  before, arrow, after = pattern.partition("->")
  return f"{after.strip()} -> {before.strip()}" if arrow else pattern


def _axes(side: str) -> list[list[str]]:
  """Returns the letters of each axis of one side of a pattern."""
  return [
    (group or letter).split()
    for group, letter in re.findall(r"\(([^)]*)\)|(\w+)", side)
  ]


def _shape(axes: list[list[str]], sizes: Sizes) -> tuple[int, ...]:
  return tuple(math.prod(sizes[letter] for letter in axis) for axis in axes)


def _rearrange(array: np.ndarray, pattern: str, sizes: Sizes) -> np.ndarray:
  before, _, after = pattern.partition("->")
  if not after:
    return array
  letters = set(re.findall(r"\w+", pattern))
  # The letter of a fused axis has no size of its own: einops finds it.
  known = {letter: sizes[letter] for letter in letters & sizes.keys()}
  return einops.rearrange(array, f"{before}->{after}", **known)


def entries(
  table: Table, model: specs.LM, shapes: Mapping[str, tuple[int, ...]]
) -> list[Entry]:
  """Returns the tensors of a model, in the table's order, block after block.

  `shapes` are those of the parameters by name, scanned layers in front.

  Raises:
    InputError: a parameter that no row of the table holds.
  """
  found = []
  whole = [row for row in table if "{i}" not in row.theirs]
  for row_ in whole:
    pieces = tuple(Piece(part.ours, None) for part in row_.parts)
    found.append(Entry(row_.theirs, pieces, row_, _sizes(model, model.blocks[0])))
  for number, block in enumerate(model.blocks):
    place, layer = _place(model, number)
    for row_ in table:
      if row_ not in whole:
        pieces = tuple(Piece(f"{place}/{part.ours}", layer) for part in row_.parts)
        name = row_.theirs.format(i=number)
        found.append(Entry(name, pieces, row_, _sizes(model, block)))
  found = [entry for entry in found if all(p.name in shapes for p in entry.pieces)]
  held = {piece.name for entry in found for piece in entry.pieces}
  for name in shapes:
    if name not in held:
      raise InputError(f"{name}: this file format has no place for the parameter.")
  return found


def _place(model: specs.LM, number: int) -> tuple[str, int | None]:
  """Returns where block `number` stands in the parameter tree."""
  if number < len(model.prefix):
    return f"prefix_{number}", None
  layer, position = divmod(number - len(model.prefix), len(model.pattern))
  return f"layers/{position}", layer


def _sizes(model: specs.LM, block: specs.Block) -> Sizes:
  mixer = block.mixer
  sizes = {
    "V": model.vocab, "D": model.dim, "H": mixer.heads, "G": mixer.kv_heads,
    "K": mixer.head_dim, "Z": TWO, "P": mixer.head_dim // TWO,
  }  # fmt: skip
  if block.mlp is not None:
    sizes["F"] = block.mlp.hidden
  if isinstance(model.positions, specs.Learned):
    sizes["T"] = model.positions.length
  return sizes


def check_tensors(
  found: Mapping[str, tuple[int, ...]], wanted: Iterable[Entry], file: str
) -> None:
  """Compares a file's tensors, {name: shape}, with those of a model.

  Raises:
    InputError: one is missing, has another shape, or is not known.
  """
  names = {entry.name: entry for entry in wanted}
  for name, entry in names.items():
    if name not in found:
      raise InputError(
        f"{file}: the tensor {name!r} is missing; the model needs it with shape "
        f"{entry.shape}."
      )
    if tuple(found[name]) != entry.shape:
      raise InputError(
        f"{file}: the tensor {name!r} has shape {tuple(found[name])}, and the model "
        f"needs {entry.shape}."
      )
  for name in found:
    if name not in names:
      raise InputError(
        f"{file}: the tensor {name!r} is not known for this architecture."
        f"{nearest(name, names)}"
      )
