"""The one pytree that a step maps to the next; created sharded, never whole."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlm.errors import InputError
from jaxlm.models import decoder as decoders
from jaxlm.models.decoder import Decoder
from jaxlm.shapes import Array, Int, PyTree
from jaxlm.sharding.rules import (
  Layout,
  ShardingRules,
  check_divides,
  replicated_share,
)
from jaxlm.training.optimizers import ALL, Factors
from jaxlm.trees import first_match, map_named

REPLICATED_LIMIT = 0.02
HOST = "pinned_host"
"""JAX's name of the host memory that a device reads without help."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moments:
  """Where what the optimizer keeps of each parameter lives."""

  sharding: ShardingRules | None = None
  """Its own rules, averages of parameters included; None: as the parameters. With
  embed=(fsdp,data) replicas share them (Rajbhandari et al. 2020, ZeRO, stage 1)."""
  memory: Literal["device", "host"] = "device"
  """On the host it takes no memory of the device between steps; each step moves it
  there and back."""


class TrainState(NamedTuple):
  """Everything that a step reads and writes."""

  step: Int[Array, ""]
  params: PyTree
  opt_state: PyTree
  rng: Array
  ema: PyTree | None
  """An average of the parameters, in float32."""


class Plan(NamedTuple):
  """Shapes and shardings of the state, before any array exists."""

  shapes: TrainState
  shardings: TrainState


def axes_of(decoder: Decoder) -> PyTree:
  """Returns each parameter's logical axes, without making an array."""
  boxed = jax.eval_shape(lambda key: decoders.init(decoder, key), jax.random.key(0))
  return decoders.axes_of(boxed)


class First(NamedTuple):
  """How a model's parameters are drawn."""

  seed: int
  scale: Factors = ALL
  """(regex, factor) on the first values by parameter name, first match wins."""


class Trained(NamedTuple):
  """What trains where it is not the whole model."""

  axes: PyTree
  """Logical axes of each array."""
  draw: Callable[[Array, PyTree], PyTree]
  """(key, parameters of the model) -> its first values."""
  base: tuple[PyTree, PyTree]
  """Shapes of the parameters that `draw` takes, and of those that stay beside what
  trains, each with its sharding."""


def create(
  decoder: Decoder,
  transform: optax.GradientTransformation,
  first: First,
  *,
  ema: bool,
  moments: Moments = Moments(),
  trained: Trained | None = None,
):
  """Returns (plan, function that makes the state sharded as the plan says).

  The function takes a model's parameters, sharded as they shall be, and gives their
  buffers away; without them they are drawn as `first` says. With `trained` they stay,
  and the state is of what trains beside them. What the optimizer keeps of each
  parameter is placed as `moments` says.

  Raises:
    InputError: the mesh does not divide a parameter, or more than 2% of the parameter
      bytes would be whole on every device of a mesh that should split them.
  """
  layout = decoder.layout
  axes = axes_of(decoder) if trained is None else trained.axes

  def make(loaded: PyTree | None) -> TrainState:
    # Made inside: with several processes an array of one of them is no argument.
    init_key, rng = jax.random.split(jax.random.key(first.seed))
    if trained is not None:
      params = trained.draw(init_key, loaded)
    else:
      params = drawn(decoder, init_key, first.scale) if loaded is None else loaded
    return started(params, transform, rng, ema=ema)

  shapes = jax.eval_shape(make, None if trained is None else trained.base[0])
  kept = Layout(layout.mesh, moments.sharding or layout.rules)
  shardings = _shardings((layout, kept), shapes, transform, axes)
  if moments.memory == "host":
    on_host = _on_host(shapes.opt_state, shardings.opt_state)
    shardings = shardings._replace(opt_state=on_host)
  check_divides(layout, shapes.params, shardings.params)
  check_divides(kept, shapes.params, _of_params(kept, axes))
  if trained is None:
    _check_share(layout, shapes.params, shardings.params)
  else:  # what trains is thin beside its base
    placed = jax.tree.map(lambda leaf: leaf.sharding, trained.base[1])
    _check_share(layout, trained.base[1], placed)
  plan = Plan(shapes, shardings)

  def first_state(loaded: PyTree | None = None) -> TrainState:
    given_away = () if trained is not None else (0,)
    made = jax.jit(make, out_shardings=shardings, donate_argnums=given_away)
    return made(loaded)

  return plan, first_state


def drawn(decoder: Decoder, key: Array, scale: Factors) -> PyTree:
  """Returns a model's first parameters, each times its factor."""
  params = decoders.unbox(decoders.init(decoder, key))

  def scaled(name: str, leaf: Array) -> Array:
    factor = first_match(scale, name)
    return leaf if factor == 1 else leaf * jnp.asarray(factor, leaf.dtype)

  return map_named(scaled, params)


def started(
  params: PyTree, transform: optax.GradientTransformation, rng: Array, *, ema: bool
) -> TrainState:
  """Returns the state before the first step."""
  copy = lambda p: jnp.array(p, jnp.float32)  # noqa: E731
  average = jax.tree.map(copy, params) if ema else None
  step = jnp.zeros((), jnp.int32)
  return TrainState(step, params, transform.init(params), rng, average)


def _check_share(layout: Layout, shapes: PyTree, shardings: PyTree) -> None:
  """Raises InputError where too much is whole on every device."""
  share = replicated_share(layout, shapes, shardings)
  if share > REPLICATED_LIMIT:
    raise InputError(
      f"sharding: each device would hold {share:.1%} of the parameter bytes beyond its "
      f"part; at most {REPLICATED_LIMIT:.0%} may be. Let the rules of 'embed' use fsdp "
      "and those of 'vocab', 'heads', 'kv_heads' and 'mlp' use tensor, or use the mesh "
      "axis 'data' for replicas."
    )


def _on_host(shapes: PyTree, shardings: PyTree) -> PyTree:
  """Returns the shardings with every array of a parameter's size in host memory."""
  return jax.tree.map(
    lambda leaf, sharding: sharding.with_memory_kind(HOST) if leaf.ndim else sharding,
    shapes,
    shardings,
  )


def on_device(state: TrainState, shardings: TrainState) -> TrainState:
  """Returns the state with what the plan keeps in host memory brought to the device."""

  def bring(leaf, sharding):
    if sharding.memory_kind != HOST:
      return leaf
    return jax.device_put(leaf, sharding.with_memory_kind("device"))

  return jax.tree.map(bring, state, shardings)


def _of_params(layout: Layout, axes: PyTree) -> PyTree:
  is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
  return jax.tree.map(lambda names: layout.sharding(*names), axes, is_leaf=is_axes)


def _shardings(
  layouts: tuple[Layout, Layout], shapes: TrainState, transform, axes: PyTree
) -> TrainState:
  """Returns the shardings by the parameters' layout and by the moments'."""
  whole = layouts[0].sharding()
  absent = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731
  params, moments = (_of_params(layout, axes) for layout in layouts)

  def like(leaf, sharding, param):
    if absent(leaf):
      return leaf
    return sharding if leaf.shape == param.shape else whole

  like_param = optax.tree_map_params(
    transform,
    like,
    shapes.opt_state,
    moments,
    shapes.params,
    transform_non_params=lambda _: whole,
    is_leaf=absent,
  )
  ema = None if shapes.ema is None else moments
  return shapes._replace(
    step=whole, params=params, opt_state=like_param, rng=whole, ema=ema
  )
