"""The one einsum and the one lookup through which modules read their weights.

A weight is an array, or a leaf type that is known here and nowhere else.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxlm.errors import InputError
from jaxlm.ops.collectives import scatter_sum
from jaxlm.ops.fusion import unfused
from jaxlm.ops.quantized import Quantized
from jaxlm.shapes import Array, Float, Int
from jaxlm.sharding.rules import Layout

LANES = 32
"""Columns of a block: of 16 to 128 the fastest (two cores with AVX-512, XLA of jax
0.10.2), by a third against a product with the matrix."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocked:
  """A float32 matrix twice: for many vectors at a time, and for one on a CPU.

  A product with one vector is bound by the reading of the matrix. In blocks of a few
  columns that is one pass in order, with sums that stay in registers.
  """

  whole: Array
  """As the module declares it."""
  blocks_NIL: Array
  """[columns / 32, rows, 32]."""

  @property
  def shape(self) -> tuple[int, ...]:
    """As the module declares it."""
    return self.whole.shape

  @classmethod
  def of(cls, whole: Array, inputs: int) -> "Blocked | Array":
    """Returns a matrix of so many input dims in blocks, or as it is: of other dtypes,
    and where the columns do not divide, a product is faster."""
    rows = math.prod(whole.shape[:inputs])
    columns = whole.size // rows
    if columns % LANES or whole.dtype != jnp.float32:
      return whole
    blocks = whole.reshape(rows, columns // LANES, LANES).swapaxes(0, 1)
    return cls(whole, blocks)

  def times(self, x: Array) -> Array:
    """Returns the product with one vector, flat."""
    # Tied to its own matrix: else the compiler lays x out once for all matrices of a
    # shape, as large as they, instead of inside each loop.
    x, blocks_NIL = jax.lax.optimization_barrier((x.reshape(-1), self.blocks_NIL))
    return unfused(jnp.sum(x[None, :, None] * blocks_NIL, axis=1)).reshape(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
  """A matrix W that two thin ones change: W + scale A B (Hu et al. 2021).

  With a magnitude, each output's column of that sum has this length instead of its own,
  whose gradient is left out (Liu et al. 2024, DoRA, section 4.3). With ids, each row of
  a batch has an A and a B of its own.
  """

  base: "Weight"
  """W, as the module declares it."""
  a: Array
  """W's input dims, then the rank; with ids, adapters in front."""
  b: Array
  """The rank, then W's output dims; with ids, adapters in front."""
  magnitude: Array | None = None
  """W's output dims."""
  ids: Array | None = None
  """Which adapter each row of the batch has; of one that is not there it is NaN."""
  key: Array | None = None
  """Of the draws of dropout; None: nothing is dropped."""
  scale: float = dataclasses.field(default=1.0, metadata={"static": True})
  """alpha / rank, say."""
  rate: float = dataclasses.field(default=0.0, metadata={"static": True})
  """How much of the input of A is dropped, where there is a key. The rest counts
  1 / (1 - rate) times."""

  @property
  def shape(self) -> tuple[int, ...]:
    """As the module declares it."""
    return self.base.shape

  def merged(self) -> Array:
    """Returns the one matrix in their place, in the dtype of W.

    Raises:
      InputError: each row has its own.
    """
    if self.ids is not None:
      raise InputError("ids: rows with adapters of their own have no one matrix.")
    inputs = self.a.ndim - 1
    base = whole(self.base)
    a, b = (factor.astype(jnp.float32) for factor in (self.a, self.b))
    total = base.astype(jnp.float32) + self.scale * jnp.tensordot(
      a, b, 1, precision="highest"
    )
    if self.magnitude is not None:
      norm = jnp.sqrt(jnp.sum(jnp.square(total), axis=range(inputs)))
      total *= jnp.expand_dims(self.magnitude / norm, tuple(range(inputs)))
    return total.astype(base.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled:
  """A matrix whose inputs, outputs or both are multiplied (Liu et al. 2022, IA3)."""

  base: "Weight"
  """The matrix, as the module declares it."""
  inputs: Array | None = None
  """Its input dims."""
  outputs: Array | None = None
  """Its output dims."""

  @property
  def shape(self) -> tuple[int, ...]:
    """As the module declares it."""
    return self.base.shape

  def merged(self) -> Array:
    """Returns the one matrix in their place, in its dtype."""
    base = whole(self.base)
    total, dims = base.astype(jnp.float32), range(base.ndim)
    if self.inputs is not None:
      total *= jnp.expand_dims(self.inputs, tuple(dims[self.inputs.ndim :]))
    if self.outputs is not None:
      total *= jnp.expand_dims(self.outputs, tuple(dims[: -self.outputs.ndim]))
    return total.astype(base.dtype)


Weight = Float[Array, "..."] | Blocked | Lora | Quantized | Scaled
"""What a matrix may be."""


def whole(weight: Weight) -> Array:
  """Returns a weight as the array that the module declared."""
  match weight:
    case Blocked():
      return weight.whole
    case Quantized():
      return weight.whole()
    case Lora() | Scaled():
      return weight.merged()
    case _:
      return weight


def einsum(
  equation: str,
  x: Float[Array, "..."],
  weight: Weight,
  *,
  result: DTypeLike | None = None,
) -> Array:
  """Contracts an activation with a weight, in the activation's dtype.

  The equation names each dimension of both operands once. The result has the dtype
  `result`, or the activation's. The weight's gradient is summed in float32 and has the
  weight's own dtype.
  """
  dtype = jnp.dtype(result or x.dtype)
  if isinstance(weight, Lora):
    return _adapted(equation, dtype, x, weight)
  if isinstance(weight, Scaled):
    return _scaled(equation, dtype, x, weight)
  if isinstance(weight, Quantized):
    weight = weight.whole(x.dtype)
  if isinstance(weight, Blocked):
    operands, dims = equation.split("->")
    left, right = operands.split(",")
    sizes = dict(zip(left, x.shape, strict=True)) | dict(
      zip(right, weight.shape, strict=True)
    )
    if x.dtype == jnp.float32 and x.size == weight.blocks_NIL.shape[1]:
      return weight.times(x).reshape([sizes[dim] for dim in dims]).astype(dtype)
    weight = weight.whole
  return _product(equation, dtype, x, weight)


class _Dims(NamedTuple):
  """The letters of an equation."""

  left: str
  result: str
  summed: str
  made: str

  @classmethod
  def of(cls, equation: str) -> "_Dims":
    operands, result = equation.split("->")
    left, right = operands.split(",")
    summed = "".join(dim for dim in right if dim not in result)
    return cls(left, result, summed, "".join(d for d in right if d in result))


def _adapted(equation: str, dtype: jnp.dtype, x: Array, lora: Lora) -> Array:
  """Returns x (W + scale A B), without that matrix unless a magnitude asks for it."""
  dims = _Dims.of(equation)
  change = _change(dims, dtype, x, lora)
  y = einsum(equation, x, lora.base, result=dtype) + lora.scale * change
  if lora.magnitude is None:
    return y
  plain = dataclasses.replace(lora, magnitude=None, key=None)
  total = jax.lax.stop_gradient(plain).merged().astype(jnp.float32)
  axes = tuple(range(len(dims.summed)))
  factor = lora.magnitude / jnp.sqrt(jnp.sum(jnp.square(total), axis=axes))
  return _times(dims.result, dims.made, y, factor)


def _change(dims: _Dims, dtype: jnp.dtype, x: Array, lora: Lora) -> Array:
  """Returns dropped(x) A B, of each row's own A and B where there are ids."""
  a, b, row = lora.a, lora.b, ""
  if lora.ids is not None:
    if lora.ids.shape != x.shape[:1]:
      raise InputError(f"ids: {lora.ids.shape} of them for {x.shape[0]} rows.")
    a, b = (jnp.take(each, lora.ids, axis=0, mode="fill") for each in (a, b))
    row = dims.left[0]
  if lora.key is not None and lora.rate:
    kept = jax.random.bernoulli(lora.key, 1 - lora.rate, x.shape)
    x = jnp.where(kept, x / (1 - lora.rate), 0)
  low_dims = "".join(dim for dim in dims.left if dim not in dims.summed) + "r"
  low = einsum(f"{dims.left},{row}{dims.summed}r->{low_dims}", x, a)
  return einsum(f"{low_dims},{row}r{dims.made}->{dims.result}", low, b, result=dtype)


def _scaled(equation: str, dtype: jnp.dtype, x: Array, weight: Scaled) -> Array:
  dims = _Dims.of(equation)
  if weight.inputs is not None:
    x = _times(dims.left, dims.summed, x, weight.inputs)
  y = einsum(equation, x, weight.base, result=dtype)
  if weight.outputs is None:
    return y
  return _times(dims.result, dims.made, y, weight.outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _times(dims: str, own: str, x: Array, factor: Array) -> Array:
  """Returns x times a factor for some of its dims, in x's dtype.

  A factor near one is not rounded to that dtype, and its gradient is a float32 sum.
  """
  return _multiplied(dims, own, x, factor)


def _multiplied(dims: str, own: str, x: Array, factor: Array) -> Array:
  others = tuple(place for place, dim in enumerate(dims) if dim not in own)
  factor = jnp.expand_dims(factor.astype(jnp.float32), others)
  return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _times_forward(dims: str, own: str, x: Array, factor: Array):
  return _multiplied(dims, own, x, factor), (x, factor)


def _times_backward(dims: str, own: str, kept: tuple[Array, Array], dy: Array):
  x, factor = kept
  others = tuple(place for place, dim in enumerate(dims) if dim not in own)
  product = x.astype(jnp.float32) * dy.astype(jnp.float32)
  dfactor = jnp.sum(product, axis=others).astype(factor.dtype)
  return _multiplied(dims, own, dy, factor), dfactor


_times.defvjp(_times_forward, _times_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, dtype: jnp.dtype, x: Array, weight: Array) -> Array:
  return _forward(equation, dtype, x, weight)[0]


def _forward(equation: str, dtype: jnp.dtype, x: Array, weight: Array):
  y = jnp.einsum(equation, x, weight.astype(x.dtype), preferred_element_type=dtype)
  return y, (x, weight)


def _backward(equation: str, _: jnp.dtype, kept: tuple[Array, Array], dy: Array):
  x, weight = kept
  operands, result = equation.split("->")
  left, right = operands.split(",")
  dy = unfused(dy.astype(x.dtype))
  dx = jnp.einsum(f"{result},{right}->{left}", dy, weight.astype(x.dtype))
  dweight = jnp.einsum(
    f"{left},{result}->{right}", x, dy, preferred_element_type=jnp.float32
  )
  return dx, dweight.astype(weight.dtype)


_product.defvjp(_forward, _backward)


class Placed(NamedTuple):
  """Where a table lives; hashable."""

  layout: Layout
  axes: tuple[str, str]
  """The logical axes of its rows and of their dims."""


def lookup(
  placed: Placed, table_VD: Float[Array, "V D"], ids_BT: Int[Array, "B T"], dtype: str
) -> Float[Array, "B T D"]:
  """Returns the rows of a table that the ids name, in `dtype`.

  Each device sums the gradient of its own shard of the table, in float32. The gradient
  needs a batch that divides over the mesh; the lookup itself does not.
  """
  return _lookup(placed, dtype, table_VD, ids_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(placed: Placed, dtype: str, table_VD: Array, ids_BT: Array) -> Array:
  if placed.layout.mesh.size == 1:
    return jnp.take(table_VD, ids_BT, axis=0).astype(dtype)
  # Gathered whole in the model dim, in the narrower dtype: else a lookup would come out
  # split over it, and be brought whole onto every device before its rows are split.
  rows_VD = placed.layout.constrain(table_VD.astype(dtype), placed.axes[0], None)
  return jnp.take(rows_VD, ids_BT, axis=0)


def _lookup_forward(placed: Placed, dtype: str, table_VD: Array, ids_BT: Array):
  # The gradient has the table's size and dtype; an empty slice of it tells both.
  return _lookup(placed, dtype, table_VD, ids_BT), (table_VD[:, :0], ids_BT)


def _lookup_backward(placed: Placed, _: str, kept: tuple[Array, Array], dy_BTD: Array):
  empty_V0, ids_BT = kept
  layout, rules = placed.layout, placed.layout.rules
  over = rules.batch + rules.sequence
  rows, dims = (getattr(rules, axis) for axis in placed.axes)
  if set(rows) & set(over):
    rows = ()  # devices with other tokens: each needs a sum for every row
  split = tuple(axis for axis in dims if axis in over)
  rest = tuple(axis for axis in over if axis not in split)
  platform = layout.mesh.devices.flat[0].platform
  here = empty_V0.shape[0] // math.prod(layout.mesh.shape[axis] for axis in rows)

  def local(ids_BT: Array, dy_BTD: Array) -> Array:
    if rows:
      # An id of another device's rows falls outside, and is dropped.
      ids_BT = ids_BT - jax.lax.axis_index(rows) * here
      ids_BT = jnp.where(ids_BT < 0, here, ids_BT)
    total_VD = jnp.zeros((here, dy_BTD.shape[-1]), jnp.float32)
    total_VD = total_VD.at[ids_BT].add(dy_BTD.astype(jnp.float32), mode="drop")
    if split:
      total_VD = scatter_sum(total_VD, split, 1, platform)
    return jax.lax.psum(total_VD, rest) if rest else total_VD

  tokens = rules.spec(("batch", "sequence"))
  dtable_VD = jax.shard_map(
    local,
    mesh=layout.mesh,
    in_specs=(tokens, PartitionSpec(*tokens, None)),
    out_specs=PartitionSpec(rows, split),
    check_vma=False,
  )(ids_BT, dy_BTD)
  return dtable_VD.astype(empty_V0.dtype), None


_lookup.defvjp(_lookup_forward, _lookup_backward)
