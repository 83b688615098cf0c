"""Optimizers as specs; `build` makes one optax transformation of each.

Every one is: clip by global norm, the optimizer's own scaling, decoupled weight decay,
learning rate. Decay and learning rate are scaled per parameter by ordered
(regex, factor) lists over parameter names. Statistics, updates and norms are float32,
whatever the parameters are.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxlm.errors import InputError
from jaxlm.shapes import PyTree
from jaxlm.training import schedules
from jaxlm.trees import first_match, map_named

Factors = tuple[tuple[str, float], ...]
DECAY_MATRICES: Factors = (
  (r"(scale|bias)$", 0.0),
  # Of adapters: factors, lengths, and virtual tokens, to which zero means nothing.
  (r"/(inputs|outputs|magnitude|d|prompt|prefix_[kv])$", 0.0),
  (r".*", 1.0),
)
ALL: Factors = ((r".*", 1.0),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Common:
  lr: schedules.Schedule
  """Learning rate over the run."""
  weight_decay: float = 0.1
  """Share of a parameter taken off, times the learning rate."""
  decay: Factors = DECAY_MATRICES
  """(regex, factor on weight_decay) by parameter name, first match wins."""
  lr_scale: Factors = ALL
  """(regex, factor on lr) by parameter name, first match wins."""
  clip: float | None = 1.0
  """Largest global norm of the gradient; None leaves it."""

  def __post_init__(self):
    if self.weight_decay < 0:
      raise InputError(f"optimizer.weight_decay: {self.weight_decay} is negative.")
    if self.clip is not None and self.clip <= 0:
      raise InputError(
        f"optimizer.clip: {self.clip} is not positive; none turns it off."
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(_Common):
  """Loshchilov & Hutter 2019."""

  b1: float = 0.9
  """Decay of the mean of gradients."""
  b2: float = 0.95
  """Decay of the mean of squares."""
  eps: float = 1e-8
  """Added to the root of the mean of squares."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(_Common):
  """Shazeer & Stern 2018: second moments of matrices as a row and a column.

  A stack of scanned layers counts as one parameter in its root mean squares.
  """

  decay_rate: float = 0.8
  """Exponent c of the second moment's decay, 1 - step^-c."""
  factored_from: int = 128
  """Matrices whose two largest dimensions reach this are factored."""
  clip_rms: float = 1.0
  """Largest root mean square of a parameter's update."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(_Common):
  """Chen et al. 2023: the sign of an interpolated momentum."""

  b1: float = 0.9
  """Weight of the momentum in the update."""
  b2: float = 0.99
  """Decay of the momentum."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(_Common):
  """Jordan et al. 2024: orthogonalized momentum for matrices, AdamW for the rest.

  Embeddings, heads, norms and biases go to AdamW. An update is scaled to the root mean
  square of AdamW's (Liu et al. 2025), so one learning rate serves both.
  """

  momentum: float = 0.95
  """Decay of the momentum; Nesterov's form."""
  iterations: int = 5
  """Newton-Schulz iterations."""
  rms: float = 0.2
  """Root mean square of an orthogonalized update."""
  b1: float = 0.9
  """AdamW: decay of the mean of gradients."""
  b2: float = 0.95
  """AdamW: decay of the mean of squares."""
  eps: float = 1e-8
  """AdamW: added to the root of the mean of squares."""


Optimizer = AdamW | Adafactor | Lion | Muon


class Built(NamedTuple):
  """An optimizer ready for a step."""

  transform: optax.GradientTransformation
  schedule: schedules.Rate


def build(spec: Optimizer, steps: int, axes: PyTree) -> Built:
  """Returns the transformation of a run of so many steps.

  `axes` holds each parameter's logical axes (tuples of names); Muon reads from them
  which dimensions a matrix maps from and to.
  """
  return at_rate(spec, schedules.build(spec.lr, steps), axes)


def at_rate(spec: Optimizer, schedule: schedules.Rate, axes: PyTree) -> Built:
  """Returns the transformation whose learning rate is not the spec's own."""
  clip = optax.identity() if spec.clip is None else optax.clip_by_global_norm(spec.clip)
  transform = optax.chain(
    clip,
    _core(spec, axes),
    _add_decay(spec.weight_decay, spec.decay),
    optax.scale_by_schedule(lambda step: -schedule(step)),
    _scale(spec.lr_scale),
  )
  return Built(_on_float32(transform), schedule)


def _core(spec: Optimizer, axes: PyTree) -> optax.GradientTransformation:
  match spec:
    case AdamW():
      return optax.scale_by_adam(spec.b1, spec.b2, spec.eps)
    case Lion():
      return optax.scale_by_lion(spec.b1, spec.b2)
    case Adafactor():
      factored = optax.scale_by_factored_rms(
        decay_rate=spec.decay_rate, min_dim_size_to_factor=spec.factored_from
      )
      return optax.chain(
        _on_matrices(factored, axes),
        optax.clip_by_block_rms(spec.clip_rms),
        optax.scale_by_param_block_rms(),
      )
    case Muon():
      return _muon(spec, axes)


def _muon(spec: Muon, axes: PyTree) -> optax.GradientTransformation:
  dims = jax.tree.map(matrix_dims, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
  is_dims = lambda leaf: leaf is None or isinstance(leaf, MuonDimensionNumbers)  # noqa: E731
  labels = jax.tree.map(
    lambda leaf: "adamw" if leaf is None else "muon", dims, is_leaf=is_dims
  )

  def own(updates: PyTree) -> PyTree:
    return jax.tree.map(
      lambda leaf, of: optax.MaskedNode() if isinstance(leaf, optax.MaskedNode) else of,
      updates,
      dims,
      is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )

  def to_rms(updates: PyTree, _: PyTree | None = None) -> PyTree:
    def scale(update, of):
      fan_in = _product(update, of.reduction_axis)
      fan_out = _product(update, of.output_axis)
      return update * (spec.rms * max(fan_in, fan_out) ** 0.5)

    return jax.tree.map(scale, updates, own(updates))

  muon = optax.chain(
    scale_by_muon(
      ns_steps=spec.iterations,
      beta=spec.momentum,
      nesterov=True,
      weight_dimension_numbers=own,
    ),
    optax.stateless(to_rms),
  )
  adamw = optax.scale_by_adam(spec.b1, spec.b2, spec.eps)
  return optax.partition({"muon": muon, "adamw": adamw}, labels)


def _product(x, dims: tuple[int, ...]) -> int:
  size = 1
  for dim in dims:
    size *= x.shape[dim]
  return size


def matrix_dims(axes: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
  """Returns which dimensions a matrix maps between, or None where it is none.

  The model dim ("embed") is one side and the rest, stacked layers apart, the other.
  """
  sides = [i for i, axis in enumerate(axes) if axis not in ("layers", "embed")]
  model = [i for i, axis in enumerate(axes) if axis == "embed"]
  table = {"vocab", "positions"} & set(axes)
  if table or len(model) != 1 or not sides:
    return None
  first, last = (tuple(model), tuple(sides))
  if sides[0] < model[0]:
    first, last = last, first
  return MuonDimensionNumbers(reduction_axis=first, output_axis=last)


def _on_matrices(
  transform: optax.GradientTransformation, axes: PyTree
) -> optax.GradientTransformation:
  """Shows a transformation heads and their dims as one: [L, D, H, K] as [L, D, HK]."""
  is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731

  def view(names: tuple[str | None, ...], x: jax.Array) -> jax.Array:
    if "head_dim" not in names or "embed" not in names:
      return x
    at = names.index("head_dim")
    return x.reshape(*x.shape[: at - 1], -1, *x.shape[at + 1 :])

  def views(tree: PyTree) -> PyTree:
    return jax.tree.map(view, axes, tree, is_leaf=is_axes)

  def update(updates: PyTree, state: PyTree, params: PyTree | None = None):
    seen, state = transform.update(views(updates), state, views(params))
    return jax.tree.map(lambda u, x: u.reshape(x.shape), seen, updates), state

  def init(params: PyTree) -> PyTree:
    return transform.init(views(params) if jax.tree.leaves(params) else params)

  return optax.GradientTransformation(init, update)


def _on_float32(
  transform: optax.GradientTransformation,
) -> optax.GradientTransformation:
  def update(updates: PyTree, state: PyTree, params: PyTree | None = None):
    return transform.update(in_float32(updates), state, in_float32(params))

  return optax.GradientTransformation(
    lambda params: transform.init(in_float32(params)), update
  )


def _add_decay(weight_decay: float, factors: Factors) -> optax.GradientTransformation:
  def decay(updates: PyTree, params: PyTree | None) -> PyTree:
    if weight_decay == 0:
      return updates
    return map_named(
      lambda name, u, p: u + (weight_decay * first_match(factors, name)) * p,
      updates,
      params,
    )

  return optax.stateless(decay)


def _scale(factors: Factors) -> optax.GradientTransformation:
  def scale(updates: PyTree, _: PyTree | None) -> PyTree:
    return map_named(lambda name, u: u * first_match(factors, name), updates)

  return optax.stateless(scale)


def in_float32(tree: PyTree) -> PyTree:
  """Returns a tree with every leaf in float32."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def moved(params: PyTree, updates: PyTree) -> PyTree:
  """Returns params + updates, added in float32, in the dtypes of the parameters."""
  return jax.tree.map(
    lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates
  )


def decayed(params: PyTree, average: PyTree, decay: float) -> PyTree:
  """Returns decay * average + (1 - decay) * params; the average is float32."""
  return jax.tree.map(
    lambda a, p: decay * a + (1 - decay) * p.astype(a.dtype), average, params
  )


def norm(tree: PyTree) -> jax.Array:
  """Returns the global norm in float32."""
  return optax.tree.norm(in_float32(tree))
