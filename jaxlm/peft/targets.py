"""What all methods of tuning share: the matrices they are for, and their parts."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxlm.models import decoder as decoders
from jaxlm.models.decoder import Decoder
from jaxlm.models.parameters import Matrix, declared
from jaxlm.ops.quantized import Quantized
from jaxlm.ops.weights import Lora, Scaled, whole
from jaxlm.peft.filters import chosen
from jaxlm.shapes import Array, PyTree
from jaxlm.trees import map_named, named_leaves


class Tuning(NamedTuple):
  """What trains beside a frozen model (the base), as functions over parameters."""

  axes: PyTree
  """Logical axes of each array that trains, a tuple of names each."""
  init: Callable[[PyTree, Array], PyTree]
  """(base, key) -> the arrays that train, nested dicts, float32 by default."""
  attach: Callable[[PyTree, PyTree, Array | None], PyTree]
  """(base, arrays that train, key of the step's draws or None) -> what the decoder
  takes in place of the base. Pure, and nothing large is copied."""
  prepare: Callable[[PyTree], PyTree] | None = None
  """(base) -> the base as it stays frozen, where a method changes it at the start."""


class Targets(NamedTuple):
  """The matrices that a method is for, and the shape of each."""

  matrices: dict[str, Matrix]
  shapes: dict[str, tuple[int, ...]]
  """Of the whole leaves, stacked layers included."""

  def stacked(self, name: str) -> int:
    """Returns how many leading dims of a leaf are layers."""
    return len(self.shapes[name]) - len(self.matrices[name].axes)

  def sizes(self, name: str) -> tuple[int, int]:
    """Returns the inputs and the outputs of a matrix."""
    own = self.shapes[name][self.stacked(name) :]
    inputs = self.matrices[name].inputs
    return math.prod(own[:inputs]), math.prod(own[inputs:])

  def parts(self, name: str) -> tuple[tuple[int, ...], ...]:
    """Returns the dims of a leaf: of stacked layers, of inputs, of outputs."""
    shape, stacked = self.shapes[name], self.stacked(name)
    middle = stacked + self.matrices[name].inputs
    return shape[:stacked], shape[stacked:middle], shape[middle:]

  def axes(self, name: str) -> tuple[tuple[str | None, ...], ...]:
    """Returns the logical axes of a leaf: of stacked layers, of inputs, of outputs."""
    matrix = self.matrices[name]
    layers = ("layers",) * self.stacked(name)
    return layers, matrix.axes[: matrix.inputs], matrix.axes[matrix.inputs :]


def targets_of(
  wanted: tuple[str, ...], decoder: Decoder, field: str = "adapters.targets"
) -> Targets:
  """Returns the matrices of a model that presets or regexes name.

  `field` is where the config says it, for messages.

  Raises:
    InputError: one of them names no matrix.
  """
  with declared() as found:
    shapes = jax.eval_shape(lambda key: decoders.init(decoder, key), jax.random.key(0))
  leaves = named_leaves(decoders.unbox(shapes))
  names = chosen(field, wanted, (n for n in leaves if n in found))
  return Targets(
    {n: found[n] for n in names}, {n: tuple(leaves[n].shape) for n in names}
  )


def put(tree: dict[str, Any], name: str, value: Any) -> None:
  """Sets a leaf of nested dicts by its slash-joined name, in place."""
  *parents, last = name.split("/")
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[last] = value


def get(tree: PyTree, name: str) -> Any:
  """Returns what stands in nested dicts at a slash-joined name."""
  return functools.reduce(lambda node, key: node[key], name.split("/"), tree)


def copied(tree: PyTree) -> PyTree:
  """Returns new dicts around the same leaves."""
  return {n: copied(v) if isinstance(v, dict) else v for n, v in tree.items()}


def joined(one: PyTree, other: PyTree) -> PyTree:
  """Returns nested dicts with the leaves of both, which have no name in common."""
  tree = copied(one)
  for name, value in other.items():
    tree[name] = joined(tree[name], value) if name in tree else value
  return tree


def is_stacked(name: str) -> bool:
  """Says whether the first dim of a leaf of this name is layers."""
  return name.startswith("layers/")


def is_leaf(leaf: Any) -> bool:
  """Says whether this stands for one matrix and is no array."""
  return isinstance(leaf, Lora | Quantized | Scaled)


def merge(params: PyTree) -> PyTree:
  """Returns new parameters, each leaf that is no array made one.

  Raises:
    InputError: rows have adapters of their own.
  """

  def merged(name: str, leaf: Any) -> Array:
    if not is_leaf(leaf):
      return leaf
    return jax.vmap(whole)(leaf) if is_stacked(name) else whole(leaf)

  return map_named(merged, params, is_leaf=is_leaf)
