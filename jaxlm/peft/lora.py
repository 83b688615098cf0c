"""Low-rank adapters: a matrix stays as it is, and two thin ones beside it train.

tuning = lora.tuning(LoRA(rank=8), decoder)
adapters = tuning.init(base, key)
params = tuning.attach(base, adapters, None)   # what a decoder takes in place of base
plain = merge(params)                          # arrays alone again
"""

import dataclasses
import functools
import math
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder
from jaxlm.ops.weights import Lora, whole
from jaxlm.peft.targets import Targets, Tuning, copied, get, put, targets_of
from jaxlm.shapes import Array, Float, Int, PyTree
from jaxlm.trees import first_match

Ranks = tuple[tuple[str, int], ...]
Alphas = tuple[tuple[str, float], ...]

STARTS = ("zero", "pissa", "olora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
  """Low-rank adapters (Hu et al. 2021)."""

  targets: tuple[str, ...] = ("all-linear",)
  """Which matrices have one: names of presets, or regexes over names."""
  rank: int = 8
  """Columns of A and rows of B."""
  alpha: float = 16.0
  """The product counts alpha / rank times."""
  ranks: Ranks = ()
  """Other ranks: (regex over names, rank), of which the first that matches counts."""
  alphas: Alphas = ()
  """Other alphas, likewise."""
  rslora: bool = False
  """Whether it counts alpha / sqrt(rank) times (Kalajdzievski 2023)."""
  dora: bool = False
  """Whether the length of each output's column is learnt apart (Liu et al. 2024)."""
  dropout: float = 0.0
  """How much of the input of A is dropped while training; the rest counts
  1 / (1 - dropout) times. The frozen matrix sees its whole input."""
  start: Literal["zero", "pissa", "olora"] = "zero"
  """First values: B zero and A drawn; or A B the matrix's largest singular values (Meng
  et al. 2024, PiSSA) or the front of its QR decomposition (Buyukakyuz 2024, OLoRA),
  taken off the frozen matrix, in its dtype. All start with the model unchanged."""
  first: str = "uniform"
  """How A is drawn where B is zero: uniform within 1 / sqrt(inputs), as PEFT has it, or
  normal of deviation 1 / rank."""

  def __post_init__(self):
    for field, rank in (("rank", self.rank), *(("ranks", r) for _, r in self.ranks)):
      if rank < 1:
        raise InputError(f"adapters.{field}: {rank} is under 1.")
    alphas = (("alpha", self.alpha), *(("alphas", alpha) for _, alpha in self.alphas))
    for field, alpha in alphas:
      if not 0 < alpha < math.inf:
        raise InputError(f"adapters.{field}: {alpha} is not a positive number.")
    if not 0 <= self.dropout < 1:
      raise InputError(f"adapters.dropout: {self.dropout} is not from 0 to under 1.")
    if self.start not in STARTS:
      raise InputError(
        f"adapters.start: {self.start!r} is none of {', '.join(STARTS)}."
      )
    if self.first not in ("uniform", "normal"):
      raise InputError(f"adapters.first: {self.first!r} is not uniform or normal.")

  def rank_of(self, name: str) -> int:
    """Returns the columns of A of a matrix."""
    return first_match((*self.ranks, ("", self.rank)), name)

  def scale_of(self, name: str) -> float:
    """Returns what the product of both matrices is multiplied by."""
    rank = self.rank_of(name)
    alpha = first_match((*self.alphas, ("", self.alpha)), name)
    return alpha / (math.sqrt(rank) if self.rslora else rank)


def tuning(spec: LoRA, decoder: Decoder) -> Tuning:
  """Returns adapters of a model: {.. name of a matrix: {a, b}} in float32.

  A has a matrix's stacked and input dims and then the rank; B the stacked dims, the
  rank and the output dims; with DoRA a magnitude has stacked and output dims.

  Raises:
    InputError: a target or a pattern that names no matrix, or a rank larger than one of
      them has.
  """
  targets = matrices_of(spec, decoder)

  def init(base: PyTree, key: Array) -> PyTree:
    return _init(spec, targets, base, key)

  def attach(base: PyTree, adapters: PyTree, key: Array | None) -> PyTree:
    return attached(spec, targets, base, adapters, key=key)

  prepare = functools.partial(_prepared, spec, targets)
  prepare = None if spec.start == "zero" else prepare
  return Tuning(_axes(spec, targets), init, attach, prepare)


def matrices_of(spec: LoRA, decoder: Decoder) -> Targets:
  """Returns the matrices of a model that have adapters.

  Raises:
    InputError: as `tuning`.
  """
  targets = targets_of(spec.targets, decoder)
  for field, rules in (("ranks", spec.ranks), ("alphas", spec.alphas)):
    for pattern, _ in rules:
      _check_finds(field, pattern, targets)
  for name in targets.matrices:
    (inputs, outputs), rank = targets.sizes(name), spec.rank_of(name)
    if rank > min(inputs, outputs):
      raise InputError(
        f"adapters.rank: {rank} is larger than {name} has, which is "
        f"{inputs} x {outputs}; at most {min(inputs, outputs)}."
      )
  return targets


def attached(
  spec: LoRA,
  targets: Targets,
  base: PyTree,
  adapters: PyTree,
  *,
  key: Array | None,
  ids_B: Int[Array, "B"] | None = None,
) -> PyTree:
  """Returns the base with a `Lora` leaf at each matrix.

  Args:
    spec: the adapters' own.
    targets: the matrices.
    base: what stays frozen.
    adapters: {a, b} of each matrix; with ids, adapters are a dim after the layers.
    key: of dropout; None: nothing is dropped.
    ids_B: which adapter each row of a batch has.
  """
  params = copied(base)
  for number, name in enumerate(targets.matrices):
    found, layers = get(adapters, name), targets.parts(name)[0]
    own, ids = None, None
    if key is not None and spec.dropout:
      own = jax.random.fold_in(key, number)
      own = jax.random.split(own, layers) if layers else own
    if ids_B is not None:
      ids = jnp.broadcast_to(ids_B, (*layers, *ids_B.shape))
    leaf = Lora(
      get(base, name), found["a"], found["b"], found.get("magnitude"), ids, own,
      scale=spec.scale_of(name), rate=spec.dropout,
    )  # fmt: skip
    put(params, name, leaf)
  return params


def _check_finds(field: str, pattern: str, targets: Targets) -> None:
  try:
    found = any(re.search(pattern, name) for name in targets.matrices)
  except re.error as error:
    raise InputError(f"adapters.{field}: {pattern!r} is no regex ({error}).") from error
  if not found:
    names = ", ".join(targets.matrices)
    raise InputError(f"adapters.{field}: {pattern!r} finds nothing among {names}.")


def _init(spec: LoRA, targets: Targets, base: PyTree, key: Array) -> PyTree:
  out: dict[str, Any] = {}
  for number, name in enumerate(targets.matrices):
    layers, ins, outs = targets.parts(name)
    rank = spec.rank_of(name)
    if spec.start == "zero":
      a = _drawn(spec, (*layers, *ins, rank), math.prod(ins), key=(key, number))
      b = jnp.zeros((*layers, rank, *outs))
    else:
      a, b = _split(spec, targets, base, name)
    found = {"a": a, "b": b}
    if spec.dora:
      axes = tuple(range(len(layers), len(layers) + len(ins)))
      squares = jnp.square(whole(get(base, name)).astype(jnp.float32))
      found["magnitude"] = jnp.sqrt(jnp.sum(squares, axis=axes))
    put(out, name, found)
  return out


def _drawn(
  spec: LoRA, shape: tuple[int, ...], inputs: int, *, key: tuple[Array, int]
) -> Array:
  draw = jax.random.fold_in(*key)
  if spec.first == "uniform":
    bound = 1.0 / math.sqrt(inputs)
    return jax.random.uniform(draw, shape, jnp.float32, -bound, bound)
  return jax.random.normal(draw, shape, jnp.float32) / shape[-1]


def _split(
  spec: LoRA, targets: Targets, base: PyTree, name: str
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
  """Returns the A and B that a matrix itself gives at the start."""
  layers, ins, outs = targets.parts(name)
  rank, scale = spec.rank_of(name), spec.scale_of(name)
  weight = whole(get(base, name)).astype(jnp.float32)
  flat = weight.reshape(*layers, math.prod(ins), math.prod(outs))
  if spec.start == "pissa":
    u, values, v = jnp.linalg.svd(flat, full_matrices=False)
    roots = jnp.sqrt(values[..., :rank] / scale)
    a = u[..., :rank] * jnp.expand_dims(roots, -2)
    b = v[..., :rank, :] * jnp.expand_dims(roots, -1)
  else:
    # Of the matrix as PEFT has it, (outputs, inputs): its factors are other ones.
    q, r = jnp.linalg.qr(flat.mT)
    a, b = r[..., :rank, :].mT, q[..., :rank].mT
  return a.reshape(*layers, *ins, rank), b.reshape(*layers, rank, *outs)


def _prepared(spec: LoRA, targets: Targets, base: PyTree) -> PyTree:
  """Returns the base less the first product of every pair."""
  params = copied(base)
  for name in targets.matrices:
    weight = whole(get(base, name))
    layers, ins, _ = targets.parts(name)
    a, b = _split(spec, targets, base, name)
    a = a.reshape(*layers, math.prod(ins), -1)
    b = b.reshape(*layers, a.shape[-1], -1)
    change = jnp.matmul(a, b, precision="highest").reshape(weight.shape)
    less = weight.astype(jnp.float32) - spec.scale_of(name) * change
    put(params, name, less.astype(weight.dtype))
  return params


def _axes(spec: LoRA, targets: Targets) -> PyTree:
  out: dict[str, Any] = {}
  for name in targets.matrices:
    layers, ins, outs = targets.axes(name)
    found = {"a": (*layers, *ins, None), "b": (*layers, None, *outs)}
    if spec.dora:
      found["magnitude"] = (*layers, *outs)
    put(out, name, found)
  return out
