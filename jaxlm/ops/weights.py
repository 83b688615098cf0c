"""The one einsum and the one lookup through which modules read their weights.

A weight is an array today. Other leaf types (quantized, adapted) are to be known here
and nowhere else.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.shapes import Array, Float, Int


def einsum(equation: str, x: Float[Array, "..."], weight: Float[Array, "..."]) -> Array:
  """Contracts an activation with a weight, in the activation's dtype."""
  return jnp.einsum(equation, x, weight.astype(x.dtype))


def lookup(
  table_VD: Float[Array, "V D"], ids: Int[Array, "..."], dtype: DTypeLike
) -> Float[Array, "... D"]:
  """Returns the rows of a table that the ids name, in `dtype`."""
  return jnp.take(table_VD, ids, axis=0).astype(dtype)
