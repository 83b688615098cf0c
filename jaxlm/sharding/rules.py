"""Logical axis names and the mesh axes that they are split over."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.errors import InputError, nearest
from jaxlm.shapes import Array, PyTree
from jaxlm.sharding.mesh import AXES
from jaxlm.trees import map_named, named_leaves

Axes = tuple[str, ...]
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
  """For each logical axis the mesh axes that split it; () keeps it whole."""

  batch: Axes = BATCH_AXES
  """Rows of activations and of the input."""
  sequence: Axes = ("context",)
  """Positions of activations."""
  residual: Axes = ()
  """The model dim of activations."""
  heads: Axes = ("tensor",)
  """Query heads, of parameters and activations."""
  kv_heads: Axes = ("tensor",)
  """Key-value heads, of parameters and activations."""
  head_dim: Axes = ()
  """Dim of a head."""
  mlp: Axes = ("tensor",)
  """Hidden units of an MLP, of parameters and activations."""
  embed: Axes = ("fsdp",)
  """The model dim of parameters."""
  vocab: Axes = ("tensor",)
  """Vocabulary, of parameters and logits."""
  positions: Axes = ()
  """Rows of a learned position table."""
  norm: Axes = ()
  """Scales and biases of norms and projections; small, so kept whole."""
  layers: Axes = ()
  """The stack of layers that one scan runs over."""

  def __post_init__(self):
    for field in dataclasses.fields(self):
      for axis in getattr(self, field.name):
        if axis not in AXES:
          raise InputError(
            f"sharding.{field.name}: {axis!r} is no mesh axis; the axes are "
            f"{', '.join(AXES)}.{nearest(axis, AXES)}"
          )

  def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
    """Returns the PartitionSpec of an array whose dimensions have these names.

    Raises:
      InputError: an unknown name, or two names that land on one mesh axis.
    """
    names = [field.name for field in dataclasses.fields(self)]
    taken: dict[str, str] = {}
    entries: list[Any] = []
    for axis in axes:
      if axis is not None and axis not in names:
        raise InputError(
          f"sharding: no logical axis {axis!r}; the axes are {', '.join(names)}."
          f"{nearest(axis, names)}"
        )
      over = () if axis is None else getattr(self, axis)
      for mesh_axis in over:
        if mesh_axis in taken:
          raise InputError(
            f"sharding: {taken[mesh_axis]!r} and {axis!r} of the same array {axes} are "
            f"both split over the mesh axis {mesh_axis!r}; change one of the rules."
          )
        taken[mesh_axis] = str(axis)
      entries.append(None if not over else over[0] if len(over) == 1 else over)
    return PartitionSpec(*entries)


@dataclasses.dataclass(frozen=True)
class Layout:
  """A device mesh and the rules onto it; hashable, so a module can hold it."""

  mesh: jax.sharding.Mesh
  rules: ShardingRules = ShardingRules()

  def sharding(self, *axes: str | None) -> NamedSharding:
    """Returns the sharding of an array whose dimensions have these names."""
    return NamedSharding(self.mesh, self.rules.spec(axes))

  def constrain(self, x: Array, *axes: str | None) -> Array:
    """Tells the compiler how an activation is split; its values do not change."""
    sharding = self.sharding(*axes)
    if self.mesh.size == 1:
      return x
    return jax.lax.with_sharding_constraint(x, sharding)

  def size(self, logical: str) -> int:
    """Returns over how many devices a logical axis is split."""
    return math.prod(self.mesh.shape[axis] for axis in getattr(self.rules, logical))


def check_divides(layout: Layout, shapes: PyTree, shardings: PyTree) -> None:
  """Raises InputError naming the first leaf that its sharding does not divide."""
  placed = named_leaves(shardings)
  for name, leaf in named_leaves(shapes).items():
    for dim, over in zip(leaf.shape, placed[name].spec, strict=False):
      over = (over,) if isinstance(over, str) else over or ()
      count = math.prod(layout.mesh.shape[axis] for axis in over)
      if dim % count:
        raise InputError(
          f"mesh: dimension {dim} of {name} {leaf.shape} does not divide by {count}, "
          f"the size of mesh axes {over}. Choose a smaller axis or change the rule."
        )


def replicated_share(layout: Layout, shapes: PyTree, shardings: PyTree) -> float:
  """Returns the share of bytes that FSDP and tensor axes should split and do not.

  A leaf counts as replicated when every device holds it whole although the mesh has an
  fsdp, tensor or expert axis larger than one.
  """
  splits = ("fsdp", "tensor", "expert")
  if all(layout.mesh.shape[axis] == 1 for axis in splits):
    return 0.0
  sizes = map_named(lambda _, x: x.size * x.dtype.itemsize, shapes)
  placed = named_leaves(shardings)
  total = whole = 0
  for name, size in named_leaves(sizes).items():
    total += size
    whole += size if placed[name].is_fully_replicated else 0
  return whole / total
