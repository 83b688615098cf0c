"""How a module declares a parameter: shape, logical axes, first values.

A parameter stands constrained to its own sharding. That changes nothing forward; of its
gradient it says, where it is made, that each device sums its own shard alone.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.linen as nn

from jaxlm.ops.quantized import Quantized
from jaxlm.ops.weights import Blocked, Lora, Scaled, Weight
from jaxlm.shapes import Array
from jaxlm.sharding.rules import Layout


class Matrix(NamedTuple):
  """How a module declared a projection."""

  axes: tuple[str | None, ...]
  """Logical axis of each dim, without those of stacked layers."""
  inputs: int
  """How many of the first dims are summed over."""


_DECLARED: contextvars.ContextVar[dict[str, Matrix] | None] = contextvars.ContextVar(
  "declared", default=None
)


@contextlib.contextmanager
def declared() -> Iterator[dict[str, Matrix]]:
  """Gives a dict that collects {name: matrix} of all that is declared inside."""
  found: dict[str, Matrix] = {}
  token = _DECLARED.set(found)
  try:
    yield found
  finally:
    _DECLARED.reset(token)


@runtime_checkable
class Owner(Protocol):
  """A module that declares parameters."""

  @property
  def path(self) -> tuple[str, ...]:
    """Linen's own names from the root."""
    ...

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
  found = _DECLARED.get()
  if found is not None:
    found["/".join((*module.path, name))] = Matrix(axes, inputs)
  leaf = module.variables.get("params", {}).get(name)
  if isinstance(leaf, Blocked | Quantized):
    return leaf
  if isinstance(leaf, Lora | Scaled):
    return _placed(module.layout, leaf, axes, inputs)
  return module.layout.constrain(module.param(name, init, shape, dtype), *axes)


def _placed(
  layout: Layout, leaf: Lora | Scaled, axes: tuple[str | None, ...], inputs: int
) -> Lora | Scaled:
  """Returns the leaf with each array constrained as the matrix is."""
  ins, outs, base = axes[:inputs], axes[inputs:], leaf.base

  def placed(array: Array | None, *names: str | None) -> Array | None:
    return None if array is None else layout.constrain(array, *names)

  if isinstance(base, Array):
    base = layout.constrain(base, *axes)
  if isinstance(leaf, Scaled):
    return Scaled(base, placed(leaf.inputs, *ins), placed(leaf.outputs, *outs))
  adapters = () if leaf.ids is None else (None,)
  return dataclasses.replace(
    leaf,
    base=base,
    a=layout.constrain(leaf.a, *adapters, *ins, None),
    b=layout.constrain(leaf.b, *adapters, None, *outs),
    magnitude=placed(leaf.magnitude, *outs),
  )


def given(module: Owner, name: str, *axes: str | None) -> Array | None:
  """Returns an array that was put beside the declared parameters; None: it was not.

  `axes` are the logical ones of its dims.
  """
  found = module.variables.get("params", {}).get(name)
  if found is None:
    return None
  return module.layout.constrain(found, *axes)


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
