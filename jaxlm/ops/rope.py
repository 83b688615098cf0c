"""Positions as numbers: rotation of heads, sinusoids, ALiBi slopes."""

import math

import jax.numpy as jnp
import numpy as np

from jaxlm.shapes import Array, Float, Int


def rotate(
  x_BTHK: Float[Array, "B T H K"],
  positions_BT: Int[Array, "B T"],
  frequencies: np.ndarray,
  *,
  magnitude: float = 1.0,
) -> Float[Array, "B T H K"]:
  """Rotates pairs (i, i + n) of a head's first 2n dims by position * frequencies[i].

  `frequencies` has shape [n] in radians a position, n <= K / 2; further dims pass
  unchanged. Sine and cosine are taken in float32 and multiplied by `magnitude`.
  Source: Su et al. 2021, RoFormer, in the half-split layout.
  """
  n = frequencies.shape[0]
  angles_BTn = positions_BT[:, :, None].astype(jnp.float32) * jnp.asarray(
    frequencies, jnp.float32
  ).reshape(1, 1, n)
  cos = (jnp.cos(angles_BTn) * magnitude)[:, :, None, :]
  sin = (jnp.sin(angles_BTn) * magnitude)[:, :, None, :]
  a, b, rest = jnp.split(x_BTHK, (n, 2 * n), axis=-1)
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  turned = jnp.concatenate((a * cos - b * sin, b * cos + a * sin), axis=-1)
  return jnp.concatenate((turned.astype(x_BTHK.dtype), rest), axis=-1)


def sinusoids(
  positions_BT: Int[Array, "B T"], dim: int, base: float
) -> Float[Array, "B T D"]:
  """Returns sines in the first half of the dims and cosines in the second.

  Wavelengths run from 2 pi to base * 2 pi positions. Source: Vaswani et al. 2017.
  """
  half = dim // 2
  frequencies = base ** (-np.arange(half) / max(half - 1, 1))
  angles = positions_BT[:, :, None].astype(jnp.float32) * jnp.asarray(
    frequencies, jnp.float32
  ).reshape(1, 1, half)
  return jnp.concatenate((jnp.sin(angles), jnp.cos(angles)), axis=-1)


def alibi_slopes(heads: int) -> np.ndarray:
  """Returns each head's penalty per position, shape [heads].

  A geometric series from 2^(-8/n) for n a power of two; other counts take the series of
  the power below and fill up from every second slope of the next. Source: Press et al.
  2021, ALiBi.
  """
  power = 2 ** math.floor(math.log2(heads))
  slopes = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
  if power < heads:
    between = 2.0 ** (-4.0 * np.arange(1, 2 * power + 1, 2) / power)
    slopes = np.concatenate((slopes, between[: heads - power]))
  return slopes.astype(np.float32)
