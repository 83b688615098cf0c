"""Low-rank adapters: a matrix stays as it is, and two thin ones beside it train.

tuning = lora.tuning(LoRA(rank=8), decoder)
adapters = tuning.init(base, key)
params = tuning.attach(base, adapters, None)   # what a decoder takes in place of base
plain = merge(params)                          # arrays alone again
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder
from jaxlm.ops.weights import Lora, whole
from jaxlm.peft.targets import Targets, Tuning, copied, get, put, targets_of
from jaxlm.shapes import Array, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
  """Low-rank adapters (Hu et al. 2021)."""

  targets: tuple[str, ...] = ("all-linear",)
  """Which matrices have one: names of presets, or regexes over names."""
  rank: int = 8
  """Columns of A and rows of B."""
  alpha: float = 16.0
  """The product counts alpha / rank times."""
  rslora: bool = False
  """Whether it counts alpha / sqrt(rank) times (Kalajdzievski 2023)."""
  dora: bool = False
  """Whether the length of each output's column is learnt apart (Liu et al. 2024)."""
  first: str = "uniform"
  """First values of A: uniform within 1 / sqrt(inputs), as PEFT has it, or normal of
  deviation 1 / rank. B starts at zero, so the model starts unchanged."""

  def __post_init__(self):
    if self.rank < 1:
      raise InputError(f"adapters.rank: {self.rank} is under 1.")
    if not 0 < self.alpha < math.inf:
      raise InputError(f"adapters.alpha: {self.alpha} is not a positive number.")
    if self.first not in ("uniform", "normal"):
      raise InputError(f"adapters.first: {self.first!r} is not uniform or normal.")

  @property
  def scale(self) -> float:
    """What the product of both matrices is multiplied by."""
    return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def tuning(spec: LoRA, decoder: Decoder) -> Tuning:
  """Returns adapters of a model: {.. name of a matrix: {a, b}} in float32.

  A has a matrix's stacked and input dims and then the rank; B the stacked dims, the
  rank and the output dims; with DoRA a magnitude has stacked and output dims.

  Raises:
    InputError: a target that names no matrix, or a rank larger than one of them has.
  """
  targets = targets_of(spec.targets, decoder)
  for name in targets.matrices:
    inputs, outputs = targets.sizes(name)
    if spec.rank > min(inputs, outputs):
      raise InputError(
        f"adapters.rank: {spec.rank} is larger than {name} has, which is "
        f"{inputs} x {outputs}; at most {min(inputs, outputs)}."
      )

  def init(base: PyTree, key: Array) -> PyTree:
    return _init(spec, targets, base, key)

  def attach(base: PyTree, adapters: PyTree, key: Array | None) -> PyTree:
    del key
    params = copied(base)
    for name in targets.matrices:
      found = get(adapters, name)
      leaf = Lora(
        get(base, name), found["a"], found["b"], found.get("magnitude"),
        scale=spec.scale,
      )  # fmt: skip
      put(params, name, leaf)
    return params

  return Tuning(_axes(spec, targets), init, attach)


def _init(spec: LoRA, targets: Targets, base: PyTree, key: Array) -> PyTree:
  out: dict[str, Any] = {}
  for number, name in enumerate(targets.matrices):
    layers, ins, outs = targets.parts(name)
    a_shape = (*layers, *ins, spec.rank)
    draw = jax.random.fold_in(key, number)
    if spec.first == "uniform":
      bound = 1.0 / math.sqrt(math.prod(ins))
      a = jax.random.uniform(draw, a_shape, jnp.float32, -bound, bound)
    else:
      a = jax.random.normal(draw, a_shape, jnp.float32) / spec.rank
    found = {"a": a, "b": jnp.zeros((*layers, spec.rank, *outs))}
    if spec.dora:
      axes = tuple(range(len(layers), len(layers) + len(ins)))
      squares = jnp.square(whole(get(base, name)).astype(jnp.float32))
      found["magnitude"] = jnp.sqrt(jnp.sum(squares, axis=axes))
    put(out, name, found)
  return out


def _axes(spec: LoRA, targets: Targets) -> PyTree:
  out: dict[str, Any] = {}
  for name in targets.matrices:
    layers, ins, outs = targets.axes(name)
    found = {"a": (*layers, *ins, None), "b": (*layers, None, *outs)}
    if spec.dora:
      found["magnitude"] = (*layers, *outs)
    put(out, name, found)
  return out
