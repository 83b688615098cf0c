"""Sums over devices whose result each device keeps a shard of; for use in shard_map."""

import jax
import jax.numpy as jnp

from jaxlm.shapes import Array, Float

PIECE = 7 * 2048
"""Width of one reduce-scatter on a TPU. Its compiler (libtpu 0.0.42.1, v5p:4x4x4 and
v6e:16x16) knows a reduce-scatter over a whole slice for widths of 2,048 times a small
number, and for others sums everything on every device and keeps a part."""


def scatter_sum(
  x: Float[Array, "_ _"], axes: tuple[str, ...], dim: int, platform: str
) -> Float[Array, "_ _"]:
  """Returns this device's part along `dim` of the sum over the devices of the axes."""

  def scatter(x: Array) -> Array:
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)

  if platform != "tpu":
    return scatter(x)
  other, pieces = 1 - dim, []
  for first in range(0, x.shape[other], PIECE):
    end = min(first + PIECE, x.shape[other])
    short = (first - end) % 2048
    piece = jax.lax.slice_in_dim(x, first, end, axis=other)
    piece = jnp.pad(piece, [(0, short if i == other else 0) for i in (0, 1)])
    pieces.append(jax.lax.slice_in_dim(scatter(piece), 0, end - first, axis=other))
  return jnp.concatenate(pieces, axis=other)
