"""Bottlenecks of a few units, with a nonlinearity, in each block of a frozen model.

tuning = bottleneck.tuning(Bottleneck(size=64), decoder)
trained = tuning.init(base, key)
params = tuning.attach(base, trained, None)   # the base with what Block reads
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, named_blocks
from jaxlm.models.spec import LM
from jaxlm.peft.targets import Tuning, copied, get, put
from jaxlm.shapes import Array, PyTree

SIDES = ("down", "down_bias", "up", "up_bias")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck:
  """Two thin matrices with a ReLU between them; the model starts unchanged.

  They cannot be merged into the model's own matrices.
  """

  size: int = 64
  """Units between both matrices."""
  where: str = "serial"
  """serial: behind the mixer and behind the MLP, of what they give, which stays as it
  is beside (Houlsby et al. 2019); parallel: beside the MLP, of what it reads (He et al.
  2022)."""
  scale: float = 1.0
  """What comes out counts so many times; He et al. take 4 beside the MLP."""

  def __post_init__(self):
    if self.size < 1:
      raise InputError(f"adapters.size: {self.size} is under 1.")
    if self.where not in ("serial", "parallel"):
      raise InputError(f"adapters.where: {self.where!r} is not serial or parallel.")
    if not 0 < self.scale < math.inf:
      raise InputError(f"adapters.scale: {self.scale} is not a positive number.")


def tuning(spec: Bottleneck, decoder: Decoder) -> Tuning:
  """Returns bottlenecks of a model: {.. place: {down, down_bias, up, up_bias}}.

  Of a block the places are mixer_adapter and mlp_adapter, or mlp_beside. All is
  float32: stacked dims, and then [D, size], [size], [size, D] and [D].

  Raises:
    InputError: they would stand beside MLPs and no block has one.
  """
  places = _places(spec, decoder.spec)
  dim = decoder.spec.dim

  def init(base: PyTree, key: Array) -> PyTree:
    del base
    out: dict[str, Any] = {}
    for number, (name, layers) in enumerate(places.items()):
      draw = jax.random.fold_in(key, number)
      down = jax.random.normal(draw, (*layers, dim, spec.size)) / math.sqrt(dim)
      put(out, f"{name}/down", down)
      put(out, f"{name}/down_bias", jnp.zeros((*layers, spec.size)))
      put(out, f"{name}/up", jnp.zeros((*layers, spec.size, dim)))
      put(out, f"{name}/up_bias", jnp.zeros((*layers, dim)))
    return out

  def attach(base: PyTree, trained: PyTree, key: Array | None) -> PyTree:
    del key
    params = copied(base)
    for name in places:
      for side in SIDES:
        leaf = get(trained, f"{name}/{side}")
        put(params, f"{name}/{side}", leaf * spec.scale if "up" in side else leaf)
    return params

  axes: dict[str, Any] = {}
  for name, layers in places.items():
    stack = ("layers",) * len(layers)
    put(axes, f"{name}/down", (*stack, "embed", None))
    put(axes, f"{name}/down_bias", (*stack, None))
    put(axes, f"{name}/up", (*stack, None, "embed"))
    put(axes, f"{name}/up_bias", (*stack, None))
  return Tuning(axes, init, attach)


def _places(spec: Bottleneck, model: LM) -> dict[str, tuple[int, ...]]:
  """Returns {name: stacked dims} of each bottleneck."""
  out: dict[str, tuple[int, ...]] = {}
  for name, (block, layers) in named_blocks(model).items():
    if spec.where == "serial":
      out[f"{name}/mixer_adapter"] = layers
    if block.mlp is not None:
      out[f"{name}/mlp_{'adapter' if spec.where == 'serial' else 'beside'}"] = layers
  if not out:
    raise InputError("adapters.where: 'parallel' is beside MLPs, and no block has one.")
  return out
