"""The formats of quantized weights, and a weight in one of them.

A block is a run of a weight's outputs, their dims taken as one. Codes are the nearest
there are: between two integers the even one, between two values of a table the lower
one. A block of zeros stays one.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import InputError
from jaxlm.ops.quantized import DYNAMIC, GROUP, Code, CodedScales, Quantized, pack
from jaxlm.ops.quantized import NF4 as NF4_VALUES
from jaxlm.shapes import Array

TINY = np.finfo(np.float32).tiny
FP8_MAX = 448.0
"""The largest number of float8_e4m3fn."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8:
  """Whole numbers of -127 to 127: 8 bits, and the scales."""

  block: int | None = None
  """Neighbours that share a scale; None: all that are summed into one output."""

  def __post_init__(self):
    _check_block(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4:
  """Whole numbers of -7 to 7: 4 bits, and the scales."""

  block: int = 64
  """Neighbours that share a scale."""

  def __post_init__(self):
    _check_block(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4:
  """Quantiles of a normal distribution (Dettmers et al. 2023, QLoRA), as bitsandbytes
  has them: 4.5 bits a parameter, 4.127 with double quantization."""

  block: int = 64
  """Neighbours that share a scale."""
  double: bool = True
  """Whether the scales are quantized too, to 8 bits."""

  def __post_init__(self):
    _check_block(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8:
  """float8_e4m3fn (Micikevicius et al. 2022): 8 bits, and the scales."""

  block: int | None = None
  """Neighbours that share a scale; None: all that are summed into one output."""

  def __post_init__(self):
    _check_block(self)


Format = Int8 | Int4 | NF4 | FP8
"""How a weight is quantized."""


def quantize(
  spec: Format, weight: Array, *, inputs: int, stacked: int = 0
) -> Quantized:
  """Returns the leaf that stands for a weight of finite numbers.

  Args:
    spec: Its format.
    weight: Dims of stacked layers, then those summed over, then the outputs.
    inputs: How many dims are summed over.
    stacked: How many leading dims are layers, each quantized as if alone.

  Raises:
    InputError: the dims or the dtype do not suit the format.
  """
  _check(spec, weight, inputs, stacked)
  ahead = stacked + inputs
  outputs = weight.shape[ahead:]
  plain = weight.astype(jnp.float32).reshape(*weight.shape[:ahead], -1)
  if spec.block is None:
    summed = tuple(range(stacked, stacked + inputs))
    scales = jnp.max(jnp.abs(plain), axis=summed, keepdims=True)
  else:
    blocks = plain.reshape(*plain.shape[:-1], -1, spec.block)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
  several = outputs if len(outputs) > 1 else ()
  form = functools.partial(_leaf, plain, dtype=weight.dtype.name, outputs=several)
  match spec:
    case Int8():
      return form(scales / 127, code="int8")
    case Int4():
      return form(scales / 7, code="int4")
    case FP8():
      return form(scales / FP8_MAX, code="fp8")
    case NF4():
      leaf = form(scales, code="nf4")
      if spec.double:
        return dataclasses.replace(leaf, scales=_coded(scales, stacked))
      return leaf


def bits_per_parameter(
  spec: Format, shape: tuple[int, ...], *, inputs: int, stacked: int = 0
) -> float:
  """Returns the stored bits of a weight of this shape, scales included, over its size.

  Raises:
    InputError: as of `quantize`.
  """
  fn = functools.partial(quantize, spec, inputs=inputs, stacked=stacked)
  leaf = jax.eval_shape(fn, jax.ShapeDtypeStruct(shape, jnp.float32))
  return 8 * leaf.nbytes / leaf.size


def _leaf(
  plain: Array, scales: Array, *, code: Code, dtype: str, outputs: tuple[int, ...]
) -> Quantized:
  """Returns the codes nearest to a weight over its scales."""
  scales = jnp.where(scales < TINY, 0.0, scales)
  blocks = plain.reshape(*plain.shape[:-1], scales.shape[-1], -1)
  units = (blocks / _divisor(scales)[..., None]).reshape(plain.shape)
  match code:
    case "int8":
      codes = jnp.clip(jnp.round(units), -127, 127).astype(jnp.int8)
    case "int4":
      codes = pack(jnp.clip(jnp.round(units), -7, 7) + 8)
    case "fp8":
      codes = jnp.clip(units, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn)
    case "nf4":
      codes = pack(_nearest(np.array(NF4_VALUES, np.float32), units))
  return Quantized(codes, scales, code, dtype, outputs)


def _coded(scales: Array, stacked: int) -> CodedScales:
  """Returns scales in 8 bits, each layer's by itself, as bitsandbytes does."""
  flat = scales.reshape(*scales.shape[:stacked], -1)
  offset = jnp.mean(flat, axis=-1)
  flat = flat - offset[..., None]
  missing = -flat.shape[-1] % GROUP
  padded = jnp.pad(flat, [(0, 0)] * stacked + [(0, missing)])
  padded = padded.reshape(*padded.shape[:-1], -1, GROUP)
  groups = jnp.max(jnp.abs(padded), axis=-1)
  codes = _nearest(DYNAMIC, padded / _divisor(groups)[..., None])
  codes = codes.reshape(*codes.shape[:-2], -1)[..., : flat.shape[-1]]
  return CodedScales(codes.astype(jnp.uint8).reshape(scales.shape), groups, offset)


def _divisor(scales: Array) -> Array:
  """Returns scales, and 1 for those that are zero or would divide as if they were."""
  return jnp.where(scales < TINY, 1.0, scales)


def _nearest(values: np.ndarray, x: Array) -> Array:
  """Returns the places of the nearest of rising values; of two, the lower one."""
  middles = (values[:-1] + values[1:]) / np.float32(2)
  return jnp.searchsorted(jnp.asarray(middles), x, side="left")


def _check_block(spec: Format) -> None:
  if spec.block is not None and spec.block < 1:
    raise InputError(f"{type(spec).__name__}.block: {spec.block} is under 1.")


def _check(spec: Format, weight: Array, inputs: int, stacked: int) -> None:
  shape, name = weight.shape, type(spec).__name__
  if not jnp.issubdtype(weight.dtype, jnp.floating):
    raise InputError(
      f"weight: {weight.dtype.name} of shape {shape} is not quantized; give floats."
    )
  if stacked < 0 or inputs < 1 or stacked + inputs >= len(shape):
    raise InputError(
      f"weight: shape {shape} has no {stacked} dims of layers, {inputs} of inputs and "
      "some of outputs; give at least one of inputs, and leave one of outputs."
    )
  if 0 in shape:
    raise InputError(f"weight: shape {shape} is empty; give at least one number.")
  outputs = math.prod(shape[stacked + inputs :])
  if spec.block is not None and outputs % spec.block:
    raise InputError(
      f"{name}.block: {spec.block} does not divide the {outputs} outputs of shape "
      f"{shape}; give a divisor of them."
    )
  if isinstance(spec, Int4 | NF4) and outputs % 2:
    raise InputError(
      f"weight: the {outputs} outputs of shape {shape} are odd; {name} packs two codes "
      "a byte, so give an even number."
    )
