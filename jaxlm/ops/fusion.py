"""Where XLA's CPU compiler fuses too much."""

import jax

from jaxlm.shapes import Array


def unfused(x: Array) -> Array:
  """Returns x; on a CPU, what makes it is not fused into what reads it.

  XLA's CPU loops lose their vector form when an elementwise chain is fused into a row
  reduction or into the transposed operand of a product: several times slower than
  writing the values out. Other compilers fuse as they like.
  """
  return jax.lax.platform_dependent(
    x, cpu=jax.lax.optimization_barrier, default=lambda a: a
  )
