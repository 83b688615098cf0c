"""A weight of few bits that stands where an array stood.

Every array of it has the weight's own leading dims, so that a scan over stacked layers
slices it to the leaf of one layer. Sources: Dettmers et al. 2023 (QLoRA), section 3;
Dettmers et al. 2022 (8-bit optimizers), section 2; bitsandbytes for the order of codes.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from jaxlm.shapes import Array, Float

Code = Literal["int8", "int4", "nf4", "fp8"]
"""What a code stands for: itself, itself less 8, a value of `NF4`, itself."""

Held = Array | Any
"""An array; in a tree of shapes, shardings or gradients, what stands there for it."""

GROUP = 256
"""Scales of a layer, in row-major order, that share a scale of their own."""

NF4 = (
  *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
  *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
  *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
  *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
  *(0.7229568362236023, 1.0),
)
"""Values of the codes 0 to 15 (QLoRA, appendix E)."""


def dynamic_map() -> np.ndarray:
  """Returns the 256 values of the signed dynamic map of 8 bits, rising, in float32.

  Seven decades under 1, of which the i-th from below has 2^i values of each sign, at
  the middles of as many equal parts of 0.1 to 1; then 0 and 1.
  """
  values = [0.0, 1.0]
  for i in range(7):
    edges = _linspace(0.1, 1.0, 2**i + 1)
    middles = (edges[:-1] + edges[1:]) / np.float32(2)
    decade = (np.float32(10.0 ** (i - 6)) * middles).tolist()
    values += [*decade, *(-value for value in decade)]
  return np.sort(np.array(values, np.float32))


def _linspace(start: float, stop: float, size: int) -> np.ndarray:
  """Returns PyTorch's: a step of float32, counted from the nearer end, rounded once."""
  first, last = np.float32(start), np.float32(stop)
  step = np.float64((last - first) / np.float32(size - 1))
  i = np.arange(size)
  lower, upper = np.float64(first) + step * i, np.float64(last) - step * (size - 1 - i)
  return np.where(i < size // 2, lower, upper).astype(np.float32)


DYNAMIC = dynamic_map()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedScales:
  """Positive float32 scales in 8 bits each: the double quantization of QLoRA."""

  codes: Held
  """uint8, of the shape of the scales: places in `DYNAMIC`."""
  groups: Held
  """float32, the dims of stacked layers, then one for each `GROUP` of a layer."""
  offset: Held
  """float32, the dims of stacked layers: the mean of a layer's scales."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the scales."""
    return self.codes.shape

  def whole(self) -> Float[Array, "..."]:
    """Returns the scales in float32."""
    stack = self.offset.shape
    flat = self.codes.reshape(*stack, -1)
    groups = jnp.repeat(self.groups, GROUP, axis=-1)[..., : flat.shape[-1]]
    values = jnp.asarray(DYNAMIC).at[flat].get(mode="promise_in_bounds")
    return (values * groups + self.offset[..., None]).reshape(self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """A frozen weight: codes of 4 or 8 bits, and the scales that multiply them.

  It has no gradient: what is made of it is constant.
  """

  codes: Held
  """The weight's dims, those of its outputs as one. Of four bits that last one is half
  as long: two codes a byte, of which the first has the high bits."""
  scales: Held | CodedScales
  """float32, such dims: of the last one number a block, or one for each of its columns;
  of any other as many as the weight has, or 1 for all."""
  code: Code = dataclasses.field(metadata={"static": True})
  """What the codes stand for."""
  dtype: str = dataclasses.field(metadata={"static": True})
  """Of the weight that this stands for."""
  outputs: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
  """The weight's dims of outputs, where they are several. An array whose last dim is
  that of a head alone would be padded on TPU to twice its size and more."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the weight that this stands for."""
    *dims, last = self.codes.shape
    last = 2 * last if self.code in ("int4", "nf4") else last
    return (*dims, *(self.outputs or (last,)))

  @property
  def ndim(self) -> int:
    """Of the weight that this stands for."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Of the weight that this stands for."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays here."""
    return sum(
      math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
      for leaf in jax.tree.leaves(self)
    )

  def whole(self, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
    """Returns the weight in a dtype, its own by default; products are in float32."""
    frozen = jax.tree.map(_in_order, jax.lax.stop_gradient(self))
    scales = frozen.scales
    if isinstance(scales, CodedScales):
      scales = scales.whole()
    values = _values(frozen.codes, self.code)
    block = values.shape[-1] // scales.shape[-1]
    product = values * jnp.repeat(scales, block, axis=-1)
    return product.reshape(self.shape).astype(dtype or self.dtype)


def _in_order(array: Array) -> Array:
  """Returns an array laid out row by row.

  Else a compiler may lay out all stacked layers anew before a loop over them, as it
  would like one layer inside: a second copy of the model.
  """
  order = tuple(range(array.ndim))
  return with_layout_constraint(array, Layout(major_to_minor=order))


def pack(codes: Array) -> Array:
  """Returns codes of 0 to 15 as bytes: the first of each two has the high bits.

  Codes of any dtype; bytes of uint8. The last dim, which is even, becomes half as long.
  """
  codes = codes.astype(jnp.uint8)
  return (codes[..., ::2] << 4) | codes[..., 1::2]


def unpack(packed: Array) -> Array:
  """Returns the codes that `pack` packed."""
  both = jnp.stack([packed >> 4, packed & 15], axis=-1)
  return jax.lax.optimization_barrier(both.reshape(*packed.shape[:-1], -1))


def _values(codes: Array, code: Code) -> Array:
  match code:
    case "int4":
      return unpack(codes).astype(jnp.float32) - 8
    case "nf4":
      return _chosen(NF4, unpack(codes))
    case "int8" | "fp8":
      return codes.astype(jnp.float32)


def _chosen(values: tuple[float, ...], codes: Array) -> Array:
  """Returns the values at the codes.

  Selects, one round for each bit: a gather is as fast on CPUs, but not everywhere is it
  fused into what reads it.
  """
  left = [jnp.float32(value) for value in values]
  while len(left) > 1:
    odd = (codes & 1) == 1
    left = [jnp.where(odd, b, a) for a, b in zip(left[::2], left[1::2], strict=True)]
    codes = codes >> 1
  return left[0]
