"""GLU and plain MLP."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.models import spec as specs
from jaxlm.models.parameters import bias, matrix
from jaxlm.ops.weights import einsum
from jaxlm.shapes import Array, Float
from jaxlm.sharding.rules import Layout

ACTIVATIONS = {
  "silu": jax.nn.silu,
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
  "relu": jax.nn.relu,
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


@functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
def _activate(activation: str, up_BTF: Array, gate_BTF: Array | None = None) -> Array:
  """Returns activation(up) or activation(gate) * up; only the inputs are kept."""
  if gate_BTF is None:
    return ACTIVATIONS[activation](up_BTF)
  return ACTIVATIONS[activation](gate_BTF) * up_BTF


class FeedForward(nn.Module):
  """down(activation(up(x))), or with a gate down(activation(gate(x)) * up(x))."""

  spec: specs.GLU | specs.MLP
  precision: specs.Precision
  layout: Layout
  depth: int

  @nn.compact
  def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Returns the update to the residual stream."""
    D, F = x_BTD.shape[-1], self.spec.hidden
    wide = ["up", "gate"] if isinstance(self.spec, specs.GLU) else ["up"]
    h_BTF = _activate(
      self.spec.activation,
      *(self._project(name, x_BTD, (D, F), ("embed", "mlp")) for name in wide),
    )
    h_BTF = self.layout.constrain(h_BTF, "batch", "sequence", "mlp")
    return self._project("down", h_BTF, (F, D), ("mlp", "embed"))

  def _project(
    self, name: str, x: Array, shape: tuple[int, int], axes: tuple[str, str]
  ) -> Array:
    scale = (2 * self.depth) ** -0.5 if name == "down" else 1.0
    dtype = self.precision.params
    weight = matrix(self, name, shape, axes, dtype=dtype, scale=scale)
    y = einsum("BTI,IO->BTO", x, weight)
    if self.spec.bias == "all":
      y += (
        bias(self, f"{name}_bias", shape[1:], dtype).astype(y.dtype).reshape(1, 1, -1)
      )
    return checkpoint_name(y, name)
