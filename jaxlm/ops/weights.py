"""The one einsum and the one lookup through which modules read their weights.

A weight is an array today. Other leaf types (quantized, adapted) are to be known here
and nowhere else.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.ops.fusion import unfused
from jaxlm.shapes import Array, Float, Int


def einsum(
  equation: str,
  x: Float[Array, "..."],
  weight: Float[Array, "..."],
  *,
  result: DTypeLike | None = None,
) -> Array:
  """Contracts an activation with a weight, in the activation's dtype.

  The equation names each dimension of both operands once. The result has the dtype
  `result`, or the activation's. The weight's gradient is summed in float32 and has the
  weight's own dtype.
  """
  return _product(equation, jnp.dtype(result or x.dtype), x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, dtype: jnp.dtype, x: Array, weight: Array) -> Array:
  return _forward(equation, dtype, x, weight)[0]


def _forward(equation: str, dtype: jnp.dtype, x: Array, weight: Array):
  # Not through `_product`: remat policies see no product inside a custom derivative.
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


def lookup(
  table_VD: Float[Array, "V D"], ids: Int[Array, "..."], dtype: DTypeLike
) -> Float[Array, "... D"]:
  """Returns the rows of a table that the ids name, in `dtype`."""
  return jnp.take(table_VD, ids, axis=0).astype(dtype)
