"""RMSNorm and LayerNorm; statistics are float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.models import spec
from jaxlm.shapes import Array, Float


class Norm(nn.Module):
  """Normalises the last dimension by its spec; the scale has that dimension's size."""

  spec: spec.Norm
  precision: spec.Precision

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Returns the normalised input, in the input's dtype."""
    dims = x.shape[-1:]
    y = x.astype(jnp.float32)
    start = 1.0
    if isinstance(self.spec, spec.RMSNorm):
      start = 1.0 - self.spec.offset
    else:
      y -= jnp.mean(y, axis=-1, keepdims=True)
    square = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
    y *= jax.lax.rsqrt(square + self.spec.eps)
    y *= self._param("scale", start, dims, y)
    if isinstance(self.spec, spec.LayerNorm) and self.spec.bias:
      y += self._param("bias", 0.0, dims, y)
    return y.astype(x.dtype)

  def _param(self, name: str, start: float, dims: tuple[int, ...], like: Array) -> Array:
    init = nn.with_logical_partitioning(nn.initializers.constant(start), ("norm",))
    value = self.param(name, init, dims, self.precision.params).astype(jnp.float32)
    if isinstance(self.spec, spec.RMSNorm) and self.spec.offset:
      value += self.spec.offset
    return value.reshape((1,) * (like.ndim - 1) + dims)
