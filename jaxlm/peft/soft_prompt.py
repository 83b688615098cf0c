"""Soft prompts: what trains stands in front of every text, the model stays as it is.

tuning = soft_prompt.tuning(Prompt(length=20), decoder)
trained = tuning.init(base, key)
params = tuning.attach(base, trained, None)   # the base with `prefix_k`, `prefix_v`

No row grows longer. Attention is causal, so what virtual tokens are in each layer does
not hang on the text behind them: the base runs over them once, and their keys and
values are the prefix that all rows and all packed segments see (models/attention.py).
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.errors import InputError
from jaxlm.models import cached
from jaxlm.models.decoder import Decoder, named_blocks
from jaxlm.models.spec import GQA, LM, Learned
from jaxlm.ops.weights import whole
from jaxlm.peft.targets import Tuning, copied, get, put
from jaxlm.shapes import Array, Float, PyTree

ROWS = "embed/prompt"
"""The name of the virtual tokens' embeddings."""
MLP = "embed/prompt_mlp"
"""The name of what makes them of others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefix:
  """Keys and values of virtual tokens train in each layer (Li & Liang 2021).

  They are used as they are, as PEFT does without a projection: the keys after norm and
  rotation.
  """

  length: int = 20
  """Virtual tokens, which take the first positions."""
  first: str = "tokens"
  """First values: tokens, what the model makes of tokens drawn from the vocabulary, or
  normal of deviation 1, as PEFT has it."""

  def __post_init__(self):
    _check(self.length, self.first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
  """Embeddings of virtual tokens train (Lester et al. 2021)."""

  length: int = 20
  """Virtual tokens, which take the first positions."""
  first: str = "tokens"
  """First values: tokens, embeddings of tokens drawn from the vocabulary, or normal
  with the deviation of the whole table."""

  def __post_init__(self):
    _check(self.length, self.first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTuning:
  """Embeddings of virtual tokens are made by an MLP that trains (Liu et al. 2021).

  It has two hidden layers with ReLU, and reads embeddings that train too. It starts
  with outputs of the deviation that the model's own embeddings have.
  """

  length: int = 20
  """Virtual tokens, which take the first positions."""
  hidden: int = 128
  """Units of both hidden layers."""

  def __post_init__(self):
    _check(self.length, "normal")
    if self.hidden < 1:
      raise InputError(f"adapters.hidden: {self.hidden} is under 1.")


def _check(length: int, first: str) -> None:
  if length < 1:
    raise InputError(f"adapters.length: {length} is under 1.")
  if first not in ("tokens", "normal"):
    raise InputError(f"adapters.first: {first!r} is not tokens or normal.")


def tuning(spec: Prefix | Prompt | PTuning, decoder: Decoder) -> Tuning:
  """Returns a soft prompt of a model, in float32.

  A prefix has {.. mixer: {prefix_k, prefix_v}}, stacked dims and then [S, G, K]; a
  prompt {embed: {prompt [S, D]}}; P-tuning beside it {prompt_mlp: {in, mid, out, and
  the bias of each}}. In that order they are [D, hidden], [hidden, hidden], [hidden, D].

  Raises:
    InputError: virtual tokens take all positions that the model has learned.
  """
  learned = decoder.spec.positions
  if isinstance(learned, Learned) and learned.length <= spec.length:
    raise InputError(
      f"adapters.length: {spec.length} virtual tokens leave none of the "
      f"{learned.length} positions that the model has learned."
    )
  if isinstance(spec, Prefix):
    return _prefix(spec, decoder)

  def init(base: PyTree, key: Array) -> PyTree:
    out: dict[str, Any] = {}
    if isinstance(spec, PTuning):
      put(out, ROWS, jax.random.normal(key, (spec.length, decoder.spec.dim)))
      put(out, MLP, _first_mlp(spec, base, get(out, ROWS), jax.random.fold_in(key, 1)))
    else:
      put(out, ROWS, _first_rows(spec, base, key))
    return out

  def attach(base: PyTree, trained: PyTree, key: Array | None) -> PyTree:
    del key
    rows_SD = get(trained, ROWS)
    if isinstance(spec, PTuning):
      rows_SD = _through(get(trained, MLP), rows_SD)
    return _with_prefix(decoder.spec, base, prefix_of_rows(decoder, base, rows_SD))

  axes: dict[str, Any] = {}
  put(axes, ROWS, (None, "embed"))
  if isinstance(spec, PTuning):
    sides = {"in": ("embed", None), "mid": (None, None), "out": (None, "embed")}
    put(axes, MLP, sides | {f"{name}_bias": (side[1],) for name, side in sides.items()})
  return Tuning(axes, init, attach)


def prefix_of_rows(
  decoder: Decoder, base: PyTree, rows_SD: Float[Array, "S D"]
) -> PyTree:
  """Returns {.. mixer: {prefix_k, prefix_v}} that tokens of these embeddings leave.

  Embeddings are as the table has them: before the model scales and norms them.
  """
  # Each device that has rows of its own runs the same one.
  B, S = decoder.layout.size("batch"), len(rows_SD)
  cache: dict[str, list[PyTree]] = {"prefix": [], "layers": []}
  mixers = _mixers(decoder.spec)
  for name, (mixer, layers) in mixers.items():
    one = cached.empty(mixer, B, S, jnp.dtype(decoder.precision.compute))
    made = jax.tree.map(lambda a, n=layers: jnp.zeros((*n, *a.shape), a.dtype), one)
    cache[re.split("[_/]", name)[0]].append(made)
  _, found = decoder.apply(
    {"params": base},
    jnp.zeros((B, S), jnp.int32),
    cache={room: tuple(blocks) for room, blocks in cache.items()},
    rows_BTD=jnp.broadcast_to(rows_SD[None], (B, *rows_SD.shape)),
  )
  out: dict[str, Any] = {}
  for name, (_, layers) in mixers.items():
    room, place, _ = re.split("[_/]", name)
    kept: Any = found[room][int(place)]
    row = (slice(None), 0) if layers else (0,)
    put(out, f"{name}/prefix_k", jnp.moveaxis(kept.k_BGKS[row], -1, -3))
    put(out, f"{name}/prefix_v", jnp.swapaxes(kept.v_BGSK[row], -2, -3))
  return out


def _mixers(model: LM) -> dict[str, tuple[GQA, tuple[int, ...]]]:
  """Returns the name of each mixer's parameters, its spec, and their stacked dims."""
  blocks = named_blocks(model).items()
  return {f"{name}/mixer": (block.mixer, layers) for name, (block, layers) in blocks}


def _names(model: LM) -> list[str]:
  return [f"{name}/prefix_{side}" for name in _mixers(model) for side in "kv"]


def _with_prefix(model: LM, base: PyTree, prefix: PyTree) -> PyTree:
  params = copied(base)
  for name in _names(model):
    put(params, name, get(prefix, name))
  return params


def _prefix(spec: Prefix, decoder: Decoder) -> Tuning:
  model = decoder.spec

  def init(base: PyTree, key: Array) -> PyTree:
    if spec.first == "tokens":
      found = prefix_of_rows(decoder, base, _first_rows(spec, base, key))
      return jax.tree.map(lambda a: a.astype(jnp.float32), found)
    out: dict[str, Any] = {}
    mixers = _mixers(model)
    for number, name in enumerate(_names(model)):
      mixer, layers = mixers[name.rpartition("/")[0]]
      shape = (*layers, spec.length, mixer.kv_heads, mixer.head_dim)
      put(out, name, jax.random.normal(jax.random.fold_in(key, number), shape))
    return out

  def attach(base: PyTree, trained: PyTree, key: Array | None) -> PyTree:
    del key
    return _with_prefix(model, base, trained)

  axes: dict[str, Any] = {}
  for name in _names(model):
    layers = ("layers",) if name.startswith("layers/") else ()
    put(axes, name, (*layers, None, "kv_heads", "head_dim"))
  return Tuning(axes, init, attach)


def _first_rows(spec: Prefix | Prompt, base: PyTree, key: Array) -> Array:
  table_VD = whole(base["embed"]["table"]).astype(jnp.float32)
  if spec.first == "tokens":
    ids_S = jax.random.randint(key, (spec.length,), 0, len(table_VD))
    return jnp.take(table_VD, ids_S, axis=0)
  rows_SD = jax.random.normal(key, (spec.length, table_VD.shape[1]))
  return rows_SD * jnp.std(table_VD)


def _first_mlp(spec: PTuning, base: PyTree, rows_SD: Array, key: Array) -> PyTree:
  dim, hidden = rows_SD.shape[1], spec.hidden
  sizes = {"in": (dim, hidden), "mid": (hidden, hidden), "out": (hidden, dim)}
  mlp: dict[str, Array] = {}
  for number, (name, size) in enumerate(sizes.items()):
    draw = jax.random.normal(jax.random.fold_in(key, number), size)
    mlp |= {name: draw / math.sqrt(size[0]), f"{name}_bias": jnp.zeros(size[1])}
  table_VD = whole(base["embed"]["table"]).astype(jnp.float32)
  mlp["out"] *= jnp.std(table_VD) / jnp.std(_through(mlp, rows_SD))
  return mlp


def _through(mlp: PyTree, x_SD: Array) -> Array:
  for name in ("in", "mid", "out"):
    x_SD = x_SD @ mlp[name] + mlp[f"{name}_bias"][None]
    if name != "out":
      x_SD = jax.nn.relu(x_SD)
  return x_SD
