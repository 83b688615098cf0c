"""Sums over devices whose result each device keeps a shard of; for use in shard_map."""

import jax
import jax.numpy as jnp

from jaxlm.shapes import Array, Float

PIECE = 7 * 2048
"""Columns of one reduce-scatter. TPU compilers before 2027 knew a reduce-scatter over a
whole slice for widths of 2,048 times a small number, and took a sum kept whole on every
device for others (seen on v5p:4x4x4 and v6e:16x16 with libtpu 0.0.42.1)."""


def scatter_sum(
  x_DV: Float[Array, "D V"], axes: tuple[str, ...], platform: str
) -> Float[Array, "E V"]:
  """Returns this device's rows of the sum over the devices along the mesh axes."""
  if platform != "tpu":
    return jax.lax.psum_scatter(x_DV, axes, scatter_dimension=0, tiled=True)
  width = x_DV.shape[1]
  pieces = []
  for first in range(0, width, PIECE):
    piece = x_DV[:, first : first + PIECE]
    short = -piece.shape[1] % 2048
    piece = jnp.pad(piece, ((0, 0), (0, short)))
    piece = jax.lax.psum_scatter(piece, axes, scatter_dimension=0, tiled=True)
    pieces.append(piece[:, : piece.shape[1] - short])
  return jnp.concatenate(pieces, axis=1)
