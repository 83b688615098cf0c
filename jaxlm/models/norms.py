"""RMSNorm and LayerNorm; statistics are float32."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlm.models import spec as specs
from jaxlm.shapes import Array, Float


class Norm(nn.Module):
  """Normalises the last dimension by its spec; the scale has that dimension's size."""

  spec: specs.Norm
  precision: specs.Precision

  @nn.compact
  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Returns the normalised input, in the input's dtype."""
    start = 1.0 - self.spec.offset if isinstance(self.spec, specs.RMSNorm) else 1.0
    scale = self._param("scale", start, x.shape[-1:])
    bias = None
    if isinstance(self.spec, specs.LayerNorm) and self.spec.bias:
      bias = self._param("bias", 0.0, x.shape[-1:])
    return _normalise(self.spec, x, scale, bias)

  def _param(self, name: str, start: float, dims: tuple[int, ...]) -> Array:
    init: Any = nn.with_logical_partitioning(nn.initializers.constant(start), ("norm",))
    return self.param(name, init, dims, self.precision.params)


@functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
def _normalise(
  norm: specs.Norm, x: Array, scale_D: Array, bias_D: Array | None
) -> Array:
  """Returns the normalised input; of it the backward pass keeps the input alone."""
  y = x.astype(jnp.float32)
  front = (1,) * (x.ndim - 1)
  scale = scale_D.astype(jnp.float32).reshape(*front, -1)
  if isinstance(norm, specs.RMSNorm):
    scale += norm.offset
  else:
    y -= jnp.mean(y, axis=-1, keepdims=True)
  square = jnp.mean(jnp.square(y), axis=-1, keepdims=True)
  y *= jax.lax.rsqrt(square + norm.eps) * scale
  if bias_D is not None:
    y += bias_D.astype(jnp.float32).reshape(*front, -1)
  return y.astype(x.dtype)
