"""Training a part of the model's own parameters, the rest of them frozen."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import InputError
from jaxlm.models import decoder as decoders
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import LM
from jaxlm.ops.weights import whole
from jaxlm.peft.filters import chosen
from jaxlm.peft.targets import Tuning, copied, get, put
from jaxlm.shapes import Array, PyTree
from jaxlm.trees import named_leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """Some parameters of the model train as they are; the others do not.

  They train in float32, whatever the model is in, which keeps its own copy of them.
  """

  train: tuple[str, ...] = ("norms-and-biases",)
  """Which parameters: names of presets, or regexes over names."""
  last: int | None = None
  """Of these only those in so many last blocks; None: wherever they are. A stack with
  layers of both kinds is put together in each step, which takes a copy of it."""

  def __post_init__(self):
    if self.last is not None and self.last < 1:
      raise InputError(f"adapters.last: {self.last} is under 1; none takes all blocks.")


def tuning(spec: Part, decoder: Decoder, field: str = "adapters.train") -> Tuning:
  """Returns the part: {.. name: the parameter, or its last layers}, in float32.

  Raises:
    InputError: a name that finds nothing, or more blocks than there are.
  """
  boxed = jax.eval_shape(lambda key: decoders.init(decoder, key), jax.random.key(0))
  leaves = named_leaves(decoders.unbox(boxed))
  is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
  axes = named_leaves(decoders.axes_of(boxed), is_axes)
  firsts = {name: _first(decoder.spec, spec.last, name) for name in leaves}
  within = [n for n, leaf in leaves.items() if firsts[n] < (leaf.shape or (1,))[0]]
  names = chosen(field, spec.train, within)

  def init(base: PyTree, key: Array) -> PyTree:
    del key
    out: dict[str, Any] = {}
    for name in names:
      put(out, name, get(base, name)[firsts[name] :].astype(jnp.float32))
    return out

  def attach(base: PyTree, trained: PyTree, key: Array | None) -> PyTree:
    del key
    params = copied(base)
    for name in names:
      leaf = get(trained, name)
      if firsts[name]:
        front = jax.vmap(whole)(get(base, name))[: firsts[name]]
        leaf = jnp.concatenate([front.astype(leaf.dtype), leaf])
      put(params, name, leaf)
    return params

  tree: dict[str, Any] = {}
  for name in names:
    put(tree, name, axes[name])
  return Tuning(tree, init, attach)


def _first(model: LM, last: int | None, name: str) -> float:
  """Returns the first layer of a leaf that may train; infinity: none may."""
  if last is None:
    return 0
  blocks, ahead = len(model.blocks), len(model.prefix)
  if last > blocks:
    raise InputError(f"adapters.last: {last} blocks of a model of {blocks}.")
  begins = blocks - last
  room, _, rest = name.partition("/")
  if room == "layers":
    place, patterns = int(rest.partition("/")[0]), len(model.pattern)
    return max(0, math.ceil((begins - ahead - place) / patterns))
  if room.startswith("prefix_"):
    return 0 if int(room.removeprefix("prefix_")) >= begins else math.inf
  return math.inf
