"""How a module declares a parameter: shape, logical axes, first values."""

import math
from typing import Any

import flax.linen as nn

from jaxlm.shapes import Array


def matrix(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[str, ...],
  *,
  dtype: str,
  inputs: int = 1,
  scale: float = 1.0,
) -> Array:
  """Declares a projection; its first `inputs` dimensions are summed over.

  Starts as a normal of deviation scale / sqrt(fan-in), cut at two deviations.
  """
  deviation = scale / math.sqrt(math.prod(shape[:inputs]))
  init: Any = nn.with_logical_partitioning(
    nn.initializers.truncated_normal(deviation), axes
  )
  return module.param(name, init, shape, dtype)


def table(
  module: nn.Module,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[str, ...],
  dtype: str,
) -> Array:
  """Declares an embedding: a normal of deviation 0.02 (Radford et al. 2019)."""
  init: Any = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
  return module.param(name, init, shape, dtype)


def bias(module: nn.Module, name: str, shape: tuple[int, ...], dtype: str) -> Array:
  """Declares a bias of zeros, kept whole on each device."""
  axes = (None,) * (len(shape) - 1) + ("norm",)
  init: Any = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)
  return module.param(name, init, shape, dtype)
