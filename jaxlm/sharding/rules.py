"""Logical axis names and the mesh axes that they are split over."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.errors import InputError, nearest
from jaxlm.shapes import Array, PyTree
from jaxlm.sharding.mesh import AXES
from jaxlm.trees import named_leaves

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
  """For each logical axis the mesh axes that split it; () keeps it whole."""

  batch: Axes = ("data", "fsdp")
  """Rows of activations and of the input."""
  sequence: Axes = ("context",)
  """Positions of activations."""
  stream: Axes = ("context",)
  """Positions of the residual stream between blocks; with "tensor" too, norms and
  residual sums are split over it instead of repeated (sequence parallelism)."""
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

    both = set(self.vocab) & set(self.batch + self.sequence)
    if both:
      raise InputError(
        f"sharding.vocab: {sorted(both)} split rows or positions too, and the loss "
        "needs every row's whole vocabulary. Use another mesh axis."
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


FIELDS = tuple(field.name for field in dataclasses.fields(ShardingRules))


@dataclasses.dataclass(frozen=True)
class Layout:
  """A device mesh and the rules onto it; hashable, so a module can hold it."""

  mesh: jax.sharding.Mesh
  rules: ShardingRules = ShardingRules()

  def __post_init__(self):
    used = {axis for field in FIELDS for axis in getattr(self.rules, field)}
    for axis, size in self.mesh.shape.items():
      if size > 1 and axis not in used:
        raise InputError(
          f"mesh.{axis}: {size}, and no sharding rule uses this axis, so its devices "
          "would all do the same work. Set it to 1, or name it in a rule."
        )

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
  """Returns the bytes that a device holds beyond its part, as a share of all bytes.

  Its part is one over the product of the axes that split parameters: fsdp, tensor and
  expert. A leaf that only some of them split counts by what it is held too often.
  """
  parts = math.prod(layout.mesh.shape[axis] for axis in ("fsdp", "tensor", "expert"))
  placed = named_leaves(shardings)
  total = excess = 0.0
  for name, leaf in named_leaves(shapes).items():
    size = leaf.size * leaf.dtype.itemsize
    held = math.prod(placed[name].shard_shape(leaf.shape)) * leaf.dtype.itemsize
    total += size
    excess += held - size / parts
  return excess / total
