"""Low-rank adapters: a matrix stays as it is, and two thin ones beside it train.

targets = targets_of(LoRA(rank=8), decoder)
adapters = init(targets, base, key)
params = attach(targets, base, adapters)   # what a decoder takes in place of base
plain = merge(params)                      # arrays alone again
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.errors import InputError
from jaxlm.models import decoder as decoders
from jaxlm.models.decoder import Decoder
from jaxlm.models.parameters import Matrix, declared
from jaxlm.ops.weights import Lora, whole
from jaxlm.peft.filters import chosen
from jaxlm.shapes import Array, PyTree
from jaxlm.trees import named_leaves

Factors = tuple[tuple[str, float], ...]


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


class Targets(NamedTuple):
  """The matrices that have adapters, and the shape of each; hashable by its spec."""

  spec: LoRA
  matrices: dict[str, Matrix]
  shapes: dict[str, tuple[int, ...]]
  """Of the whole leaves, stacked layers included."""

  def stacked(self, name: str) -> int:
    """Returns how many leading dims of a leaf are layers."""
    return len(self.shapes[name]) - len(self.matrices[name].axes)


def targets_of(spec: LoRA, decoder: Decoder) -> Targets:
  """Returns the matrices of a model that the spec names.

  Raises:
    InputError: a target that names no matrix, or a rank larger than one of them has.
  """
  with declared() as found:
    shapes = jax.eval_shape(lambda key: decoders.init(decoder, key), jax.random.key(0))
  leaves = named_leaves(decoders.unbox(shapes))
  names = chosen("adapters.targets", spec.targets, (n for n in leaves if n in found))
  for name in names:
    inputs, outputs = _sizes(leaves[name].shape, found[name])
    if spec.rank > min(inputs, outputs):
      raise InputError(
        f"adapters.rank: {spec.rank} is larger than {name} has, which is "
        f"{inputs} x {outputs}; at most {min(inputs, outputs)}."
      )
  return Targets(
    spec, {n: found[n] for n in names}, {n: tuple(leaves[n].shape) for n in names}
  )


def _sizes(shape: tuple[int, ...], matrix: Matrix) -> tuple[int, int]:
  own = shape[len(shape) - len(matrix.axes) :]
  return math.prod(own[: matrix.inputs]), math.prod(own[matrix.inputs :])


def init(targets: Targets, base: PyTree, key: Array) -> PyTree:
  """Returns adapters, nested as the parameters: {..: {a, b}} in float32.

  A has a matrix's stacked and input dims and then the rank; B the stacked dims, the
  rank and the output dims; with DoRA a magnitude has stacked and output dims.
  """
  spec, leaves, out = targets.spec, named_leaves(base), {}
  for number, (name, matrix) in enumerate(targets.matrices.items()):
    shape, stacked = targets.shapes[name], targets.stacked(name)
    layers, own = shape[:stacked], shape[stacked:]
    a_shape = (*layers, *own[: matrix.inputs], spec.rank)
    draw = jax.random.fold_in(key, number)
    if spec.first == "uniform":
      bound = 1.0 / math.sqrt(_sizes(shape, matrix)[0])
      a = jax.random.uniform(draw, a_shape, jnp.float32, -bound, bound)
    else:
      a = jax.random.normal(draw, a_shape, jnp.float32) / spec.rank
    found = {"a": a, "b": jnp.zeros((*layers, spec.rank, *own[matrix.inputs :]))}
    if spec.dora:
      axes = tuple(range(stacked, stacked + matrix.inputs))
      squares = jnp.square(leaves[name].astype(jnp.float32))
      found["magnitude"] = jnp.sqrt(jnp.sum(squares, axis=axes))
    _put(out, name, found)
  return out


def axes_of(targets: Targets) -> PyTree:
  """Returns the logical axes of each array of `init`: those of its matrix."""
  out: dict[str, Any] = {}
  for name, matrix in targets.matrices.items():
    layers = ("layers",) * targets.stacked(name)
    ins, outs = matrix.axes[: matrix.inputs], matrix.axes[matrix.inputs :]
    found = {"a": (*layers, *ins, None), "b": (*layers, None, *outs)}
    if targets.spec.dora:
      found["magnitude"] = (*layers, *outs)
    _put(out, name, found)
  return out


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
  *parents, last = name.split("/")
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[last] = value


def _get(tree: PyTree, name: str) -> Any:
  return functools.reduce(lambda node, key: node[key], name.split("/"), tree)


def attach(targets: Targets, base: PyTree, adapters: PyTree) -> PyTree:
  """Returns the parameters with a `Lora` leaf at each target; nothing is copied."""
  params = jax.tree.map(lambda leaf: leaf, base)
  for name in targets.matrices:
    found = _get(adapters, name)
    leaf = Lora(
      _get(base, name),
      found["a"],
      found["b"],
      found.get("magnitude"),
      scale=targets.spec.scale,
    )
    _put(params, name, leaf)
  return params


def merge(targets: Targets, params: PyTree) -> PyTree:
  """Returns new parameters of arrays alone, each adapter added to its matrix."""
  params = jax.tree.map(lambda leaf: leaf, params, is_leaf=_is_lora)
  for name in targets.matrices:
    fold = whole
    for _ in range(targets.stacked(name)):
      fold = jax.vmap(fold)
    _put(params, name, fold(_get(params, name)))
  return params


def _is_lora(leaf: Any) -> bool:
  return isinstance(leaf, Lora)
