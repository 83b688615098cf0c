"""Adapters whose low-rank pair is itself a product: VeRA and LoHa.

Both make the A and B of a `Lora` leaf where they are attached, in every step: of all
layers at once, float32, outside the scan. Their gradients pass through arrays of that
size as well.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder
from jaxlm.ops.weights import Lora
from jaxlm.peft.targets import Targets, Tuning, copied, get, put, targets_of
from jaxlm.shapes import Array, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA:
  """One frozen random pair for all matrices, and two trained vectors for each
  (Kopiczko et al. 2024): y += b * ((d * (x A)) B).

  What trains is small, what a step holds is not: as much as of LoRA of this rank.
  """

  targets: tuple[str, ...] = ("all-linear",)
  """Which matrices have them: names of presets, or regexes over names."""
  rank: int = 256
  """Columns of A and rows of B."""
  seed: int = 0
  """Of A and B, uniform within sqrt(6 / inputs) and sqrt(6 / rank). They are not saved:
  vectors that were trained beside one pair mean nothing beside another."""
  start: float = 0.1
  """First values of d; b starts at zero, so the model starts unchanged."""

  def __post_init__(self):
    if self.rank < 1:
      raise InputError(f"adapters.rank: {self.rank} is under 1.")
    if not 0 <= self.seed < 2**32:
      raise InputError(f"adapters.seed: {self.seed} is not from 0 to under 2^32.")
    if not self.start:
      raise InputError("adapters.start: at zero neither vector has a gradient.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa:
  """The elementwise product of two low-rank changes (Hyeon-Woo et al. 2022).

  (A1 B1) * (A2 B2) is of rank `rank` squared, and is applied as one pair of that rank:
  no matrix is made whole, but a step costs what LoRA of `rank` squared costs.
  """

  targets: tuple[str, ...] = ("all-linear",)
  """Which matrices have one: names of presets, or regexes over names."""
  rank: int = 8
  """Columns of A1 and A2, rows of B1 and B2."""
  alpha: float = 16.0
  """The product counts alpha / rank times."""

  def __post_init__(self):
    if self.rank < 1:
      raise InputError(f"adapters.rank: {self.rank} is under 1.")
    if not 0 < self.alpha < math.inf:
      raise InputError(f"adapters.alpha: {self.alpha} is not a positive number.")


def vera(spec: VeRA, decoder: Decoder) -> Tuning:
  """Returns vectors of a model: {.. name of a matrix: {d, b}} in float32.

  d has a matrix's stacked dims and the rank, b its stacked and output dims.

  Raises:
    InputError: a target that names no matrix.
  """
  targets = targets_of(spec.targets, decoder)

  def init(base: PyTree, key: Array) -> PyTree:
    del base, key
    out: dict[str, Any] = {}
    for name in targets.matrices:
      layers, _, outs = targets.parts(name)
      d = jnp.full((*layers, spec.rank), spec.start)
      put(out, name, {"d": d, "b": jnp.zeros((*layers, *outs))})
    return out

  def attach(base: PyTree, adapters: PyTree, key: Array | None) -> PyTree:
    del key
    params, shared = copied(base), _shared(spec, targets)
    for name in targets.matrices:
      a, b = _pair(targets, name, get(adapters, name), shared)
      put(params, name, Lora(get(base, name), a, b))
    return params

  axes: dict[str, Any] = {}
  for name in targets.matrices:
    layers, _, outs = targets.axes(name)
    put(axes, name, {"d": (*layers, None), "b": (*layers, *outs)})
  return Tuning(axes, init, attach)


def _shared(spec: VeRA, targets: Targets) -> tuple[Array, Array]:
  """Returns A and B of the most inputs and outputs that any target has."""
  sizes = [targets.sizes(name) for name in targets.matrices]
  inputs, outputs = (max(several) for several in zip(*sizes, strict=True))
  # Behind the barrier the compiler does not draw them itself, which takes it long.
  seed = jax.lax.optimization_barrier(jnp.uint32(spec.seed))
  keys = jax.random.split(jax.random.key(seed))
  bounds = math.sqrt(6 / inputs), math.sqrt(6 / spec.rank)
  shapes = (inputs, spec.rank), (spec.rank, outputs)
  a, b = (
    jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    for key, shape, bound in zip(keys, shapes, bounds, strict=True)
  )
  return a, b


def _pair(
  targets: Targets,
  name: str,
  found: dict[str, Array],
  shared: tuple[Array, Array],
) -> tuple[Array, Array]:
  layers, ins, outs = targets.parts(name)
  inputs, outputs = targets.sizes(name)
  stack = tuple(range(len(layers)))
  a, b = shared[0][:inputs], shared[1][:, :outputs].reshape(-1, *outs)
  a = jnp.expand_dims(a, stack) * jnp.expand_dims(found["d"], -2)
  b = jnp.expand_dims(b, stack) * jnp.expand_dims(found["b"], len(layers))
  return a.reshape(*layers, *ins, a.shape[-1]), b


def loha(spec: LoHa, decoder: Decoder) -> Tuning:
  """Returns factors of a model: {.. name of a matrix: {a1, b1, a2, b2}} in float32.

  As of LoRA: A has a matrix's stacked and input dims and then the rank, B the stacked
  dims, the rank and the output dims. A2 starts at zero, so the model starts unchanged;
  the others are uniform within 1 / sqrt(inputs) and 1 / sqrt(rank), as PEFT has it.

  Raises:
    InputError: a target that names no matrix.
  """
  targets = targets_of(spec.targets, decoder)

  def init(base: PyTree, key: Array) -> PyTree:
    del base
    out: dict[str, Any] = {}
    for number, name in enumerate(targets.matrices):
      layers, ins, outs = targets.parts(name)
      keys = jax.random.split(jax.random.fold_in(key, number), 3)
      a, b = (*layers, *ins, spec.rank), (*layers, spec.rank, *outs)
      by_inputs, by_rank = 1 / math.sqrt(math.prod(ins)), 1 / math.sqrt(spec.rank)
      found = {
        "a1": jax.random.uniform(keys[0], a, jnp.float32, -by_inputs, by_inputs),
        "b1": jax.random.uniform(keys[1], b, jnp.float32, -by_rank, by_rank),
        "a2": jnp.zeros(a),
        "b2": jax.random.uniform(keys[2], b, jnp.float32, -by_rank, by_rank),
      }
      put(out, name, found)
    return out

  def attach(base: PyTree, adapters: PyTree, key: Array | None) -> PyTree:
    del key
    params = copied(base)
    for name in targets.matrices:
      found, stacked = get(adapters, name), targets.stacked(name)
      a = _of_pairs(found["a1"], found["a2"], found["a1"].ndim - 1)
      b = _of_pairs(found["b1"], found["b2"], stacked)
      leaf = Lora(get(base, name), a, b, scale=spec.alpha / spec.rank)
      put(params, name, leaf)
    return params

  axes: dict[str, Any] = {}
  for name in targets.matrices:
    layers, ins, outs = targets.axes(name)
    a, b = (*layers, *ins, None), (*layers, None, *outs)
    put(axes, name, {"a1": a, "b1": b, "a2": a, "b2": b})
  return Tuning(axes, init, attach)


def _of_pairs(one: Array, other: Array, dim: int) -> Array:
  """Returns the products of each two slices of a dim, the first's slowest."""
  both = jnp.expand_dims(one, dim + 1) * jnp.expand_dims(other, dim)
  return both.reshape(*one.shape[:dim], -1, *one.shape[dim + 1 :])
