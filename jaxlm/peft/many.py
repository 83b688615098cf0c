"""Many LoRA adapters of one model: a batch whose rows have different ones, and one
adapter made of several.

batch = many.rows(spec, decoder)
stack = many.stacked([adapters, others])
params = batch.attach(base, stack, ids_B, None)   # row i has adapter ids_B[i]
spec, adapters = many.combined(one_by_name, (0.7, 0.3), Concatenated())
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder
from jaxlm.peft import lora
from jaxlm.peft.lora import LoRA
from jaxlm.peft.targets import get, is_stacked, put
from jaxlm.shapes import Array, Int, PyTree
from jaxlm.trees import named_leaves


class Rows(NamedTuple):
  """Adapters of which each row of a batch has one."""

  axes: PyTree
  """Logical axes of each array of a stack."""
  attach: Callable[[PyTree, PyTree, Int[Array, "B"], Array | None], PyTree]
  """(base, stack, which adapter each row has, key of the step's draws or None) -> what
  the decoder takes in place of the base. A row whose adapter is not there is NaN."""


def rows(spec: LoRA, decoder: Decoder) -> Rows:
  """Returns how rows of one batch take adapters of one spec.

  Each matrix gathers the A and B of every row: B times an adapter, for one layer at a
  time. Gradients of a stack are zero where a batch has no row of an adapter.

  Raises:
    InputError: as `lora.tuning`; or the spec has what rows cannot each have.
  """
  if spec.dora:
    raise InputError("adapters.dora: rows of a batch cannot each have a magnitude.")
  if spec.start != "zero":
    raise InputError(f"adapters.start: {spec.start!r} changes the base of all rows.")
  targets = lora.matrices_of(spec, decoder)

  def attach(
    base: PyTree, stack: PyTree, ids_B: Int[Array, "B"], key: Array | None
  ) -> PyTree:
    return lora.attached(spec, targets, base, stack, key=key, ids_B=ids_B)

  axes: dict[str, Any] = {}
  for name in targets.matrices:
    layers, ins, outs = targets.axes(name)
    ahead = (*layers, None)
    put(axes, name, {"a": (*ahead, *ins, None), "b": (*ahead, None, *outs)})
  return Rows(axes, attach)


def stacked(adapters: Sequence[PyTree]) -> PyTree:
  """Returns adapters of one spec on a dim, which comes after that of stacked layers.

  Raises:
    InputError: there is none, or they differ in names or shapes.
  """
  if not adapters:
    raise InputError("adapters: none to stack.")
  first = {name: leaf.shape for name, leaf in named_leaves(adapters[0]).items()}
  for number, other in enumerate(adapters[1:], 1):
    found = {name: leaf.shape for name, leaf in named_leaves(other).items()}
    for name in first.keys() | found.keys():
      if first.get(name) != found.get(name):
        raise InputError(
          f"adapters[{number}]: {name} has the shape {found.get(name)}, and of the "
          f"first {first.get(name)}. Only adapters of one spec are stacked."
        )
  out: dict[str, Any] = {}
  for name in first:
    leaves = [get(one, name) for one in adapters]
    put(out, name, jnp.stack(leaves, axis=1 if is_stacked(name) else 0))
  return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
  """The sum of all A, and of all B, each root(weight * scale) times: of adapters that
  have one rank. It is not the sum of their changes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concatenated:
  """The weighted sum of their changes, whose rank is the sum of theirs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truncated:
  """The weighted sum of their changes, of which the largest singular values stay."""

  rank: int | None = None
  """How many; None: as many as the largest of their ranks."""

  def __post_init__(self):
    if self.rank is not None and self.rank < 1:
      raise InputError(f"how.rank: {self.rank} is under 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ties:
  """As `Linear` of trimmed factors, the mean of those that have the elected sign (Yadav
  et al. 2023): at each place the sign of the sum of what was left of all."""

  density: float
  """How much of each factor stays, the largest."""

  def __post_init__(self):
    _check_density(self.density)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dare:
  """As `Linear` of factors of which a part is dropped by chance, and the rest grows by
  as much (Yu et al. 2024)."""

  density: float
  """How much of each factor stays."""

  def __post_init__(self):
    _check_density(self.density)


How = Linear | Concatenated | Truncated | Ties | Dare
"""How several adapters become one."""


def _check_density(density: float) -> None:
  if not 0 < density <= 1:
    raise InputError(f"how.density: {density} is not over 0 and up to 1.")


def combined(
  adapters: Sequence[tuple[LoRA, PyTree]],
  weights: Sequence[float],
  how: How,
  *,
  key: Array | None = None,
) -> tuple[LoRA, PyTree]:
  """Returns one adapter made of several of the same matrices, and its spec.

  The numbers are PEFT's (`add_weighted_adapter`); the new scale is 1.

  Args:
    adapters: the spec and the arrays of each.
    weights: how much each counts; a negative one takes away.
    how: the method.
    key: of `Dare`'s draws.

  Raises:
    InputError: other matrices or ranks than the method takes, as many weights as
      adapters are not given, or `Dare` has no key.
  """
  names = _same_matrices(adapters, weights)
  if key is None:
    if isinstance(how, Dare):
      raise InputError("key: Dare draws what it drops; give one.")
    key = jax.random.key(0)
  out: dict[str, Any] = {}
  for number, name in enumerate(names):
    pairs = [get(tree, name) for _, tree in adapters]
    ranks = [pair["a"].shape[-1] for pair in pairs]
    scales = [spec.scale_of(name) for spec, _ in adapters]
    counts = [w * scale for w, scale in zip(weights, scales, strict=True)]
    _check_ranks(how, name, pairs[0], ranks)
    merge = _merger(how, counts, max(ranks))
    own = jax.random.fold_in(key, number)
    if is_stacked(name):
      own = jax.random.split(own, len(pairs[0]["a"]))
      merge = jax.vmap(merge)
    put(out, name, merge(pairs, own))
  return _spec({name: get(out, name)["a"].shape[-1] for name in names}), out


def _same_matrices(
  adapters: Sequence[tuple[LoRA, PyTree]], weights: Sequence[float]
) -> list[str]:
  """Returns the names of the matrices that all adapters have."""
  if not adapters or len(weights) != len(adapters):
    raise InputError(f"weights: {len(weights)} of them for {len(adapters)} adapters.")
  several: list[list[str]] = []
  for number, (spec, tree) in enumerate(adapters):
    if spec.dora:
      raise InputError(f"adapters[{number}].dora: magnitudes cannot be combined.")
    if spec.start != "zero":
      raise InputError(
        f"adapters[{number}].start: {spec.start!r} has a base of its own; only "
        "adapters of one base are combined."
      )
    leaves = named_leaves(tree)
    several.append([name.removesuffix("/a") for name in leaves if name.endswith("/a")])
    others = set(several[0]) ^ set(several[-1])
    if others:
      raise InputError(
        f"adapters[{number}]: {', '.join(sorted(others))} is not in all adapters."
      )
  return several[0]


def _check_ranks(how: How, name: str, pair: dict[str, Array], ranks: list[int]) -> None:
  layers = is_stacked(name)
  inputs = math.prod(pair["a"].shape[layers:-1])
  most = min(inputs, math.prod(pair["b"].shape[layers + 1 :]))
  match how:
    case Concatenated() if sum(ranks) > most:
      raise InputError(
        f"how: the ranks of {name}, {ranks}, are more together than the {most} that it "
        "has; Truncated keeps fewer."
      )
    case Truncated(rank=int(rank)) if rank > most:
      raise InputError(f"how.rank: {rank} is more than {name} has, which is {most}.")
    case Linear() | Ties() | Dare() if len(set(ranks)) > 1:
      raise InputError(
        f"how: the ranks of {name} are {ranks}; {type(how).__name__} takes adapters of "
        "one rank. Concatenated and Truncated take any."
      )


Merge = Callable[[list[dict[str, Array]], Array], dict[str, Array]]


def _merger(how: How, counts: list[float], largest: int) -> Merge:
  """Returns what makes one pair {a, b} of several of one layer, with a key."""

  def summed(pairs: list[dict[str, Array]], key: Array) -> dict[str, Array]:
    del key
    if isinstance(how, Concatenated):
      a = [count * pair["a"] for count, pair in zip(counts, pairs, strict=True)]
      b = [pair["b"] for pair in pairs]
      return {"a": jnp.concatenate(a, -1), "b": jnp.concatenate(b, 0)}
    assert isinstance(how, Truncated)
    ins, outs = pairs[0]["a"].shape[:-1], pairs[0]["b"].shape[1:]
    total = jnp.zeros((math.prod(ins), math.prod(outs)))
    for count, pair in zip(counts, pairs, strict=True):
      a, b = (pair["a"].reshape(len(total), -1), pair["b"].reshape(-1, total.shape[1]))
      total += count * jnp.matmul(a, b, precision="highest")
    u, values, v = jnp.linalg.svd(total, full_matrices=False)
    rank = how.rank or largest
    roots = jnp.sqrt(values[:rank])
    a, b = u[:, :rank] * roots[None], v[:rank] * roots[:, None]
    return {"a": a.reshape(*ins, rank), "b": b.reshape(rank, *outs)}

  def each(pairs: list[dict[str, Array]], key: Array) -> dict[str, Array]:
    keys = jax.random.split(key)
    roots = [math.sqrt(abs(count)) for count in counts]
    # The sign of a weight counts once in the product.
    signed = [math.copysign(root, c) for root, c in zip(roots, counts, strict=True)]
    return {
      side: _merged_factors(how, [pair[side] for pair in pairs], weights, own)
      for side, weights, own in zip(("a", "b"), (signed, roots), keys, strict=True)
    }

  return summed if isinstance(how, Concatenated | Truncated) else each


def _merged_factors(
  how: How, factors: list[Array], weights: list[float], key: Array
) -> Array:
  stack = jnp.stack(factors)
  sizes = jnp.array(weights).reshape(-1, *(1,) * (stack.ndim - 1))
  if isinstance(how, Dare):
    kept = jax.random.bernoulli(key, how.density, stack.shape)
    stack = jnp.where(kept, stack / how.density, 0)
  if not isinstance(how, Ties):
    return jnp.sum(sizes * stack, axis=0)
  stack = jax.vmap(lambda factor: _trimmed(factor, how.density))(stack)
  elected = jnp.where(jnp.sum(stack, axis=0, keepdims=True) >= 0, 1.0, -1.0)
  agree = jnp.sign(stack) == elected
  total = jnp.sum(jnp.where(agree, sizes * stack, 0), axis=0)
  return total / jnp.maximum(jnp.sum(agree, axis=0), 1).astype(total.dtype)


def _trimmed(factor: Array, density: float) -> Array:
  """Returns a factor whose smaller numbers are zero."""
  flat = factor.reshape(-1)
  _, places = jax.lax.top_k(jnp.abs(flat), int(density * flat.size))
  return jnp.zeros_like(flat).at[places].set(flat[places]).reshape(factor.shape)


def _spec(ranks: dict[str, int]) -> LoRA:
  """Returns the spec of adapters of these ranks, whose scale is 1."""
  rank = max(ranks.values())
  exact = {f"^{re.escape(name)}$": own for name, own in ranks.items()}
  others = tuple((name, own) for name, own in exact.items() if own != rank)
  alphas = tuple((name, float(own)) for name, own in others)
  return LoRA(
    targets=tuple(exact), rank=rank, alpha=float(rank), ranks=others, alphas=alphas
  )
