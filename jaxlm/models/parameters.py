"""How a module declares a parameter: shape, logical axes, first values.

A parameter stands constrained to its own sharding. That changes nothing forward; of its
gradient it says, where it is made, that each device sums its own shard alone.
"""

import math
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn

from jaxlm.ops.weights import Blocked, Weight
from jaxlm.shapes import Array
from jaxlm.sharding.rules import Layout


@runtime_checkable
class Owner(Protocol):
  """A module that declares parameters."""

  @property
  def layout(self) -> Layout:
    """Where its arrays live."""
    ...

  @property
  def param(self) -> Any:
    """Linen's own `param`."""
    ...

  @property
  def variables(self) -> Any:
    """Linen's own `variables`."""
    ...


def matrix(
  module: Owner,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[str | None, ...],
  *,
  dtype: str,
  inputs: int = 1,
  scale: float = 1.0,
) -> Weight:
  """Declares a projection; its first `inputs` dimensions are summed over.

  A leaf that is no array but a type that `ops/weights.py` knows is given as it is.
  Starts as a normal of deviation scale / sqrt(fan-in), cut at two deviations.
  """
  deviation = scale / math.sqrt(math.prod(shape[:inputs]))
  init: Any = nn.with_logical_partitioning(
    nn.initializers.truncated_normal(deviation), axes
  )
  given = module.variables.get("params", {}).get(name)
  if isinstance(given, Blocked):
    return given
  return module.layout.constrain(module.param(name, init, shape, dtype), *axes)


def table(
  module: Owner,
  name: str,
  shape: tuple[int, ...],
  axes: tuple[str, ...],
  dtype: str,
) -> Array:
  """Declares an embedding: a normal of deviation 0.02 (Radford et al. 2019)."""
  init: Any = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
  return module.layout.constrain(module.param(name, init, shape, dtype), *axes)


def bias(module: Owner, name: str, shape: tuple[int, ...], dtype: str) -> Array:
  """Declares a bias of zeros, kept whole on each device."""
  axes = (None,) * (len(shape) - 1) + ("norm",)
  init: Any = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)
  return module.param(name, init, shape, dtype)
