"""Prompts into a cache, a chunk at a time, whatever the rows' lengths.

Rows are aligned at their first token; what a row has no token for leaves no trace in
its cache. Shapes are rounded up to few sizes, so that few programs are compiled.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.decoding import cache as caches
from jaxlm.errors import InputError
from jaxlm.models import spec
from jaxlm.models.decoder import Decoder
from jaxlm.shapes import Array, Int, PyTree

DTYPES = ("float32", "bfloat16", "int8")
"""Of keys and values in a cache."""
LEAST = 16
"""Tokens of the smallest prefill."""


class Prefix(NamedTuple):
  """Ids that many rows begin with, read once; a system prompt."""

  ids: tuple[int, ...]
  length: int
  """Positions that a row may have, these among them."""
  cache: PyTree
  dtype: str
  """Of its keys and values."""

  @classmethod
  def read(
    cls,
    decoder: Decoder,
    params: PyTree,
    ids: Sequence[int],
    *,
    length: int,
    chunk: int = 512,
    cache: str | None = None,
  ) -> "Prefix":
    """Reads the ids into a cache for rows of up to `length` positions."""
    if length <= len(ids):
      raise InputError(
        f"length: {length} positions leave no room after {len(ids)} ids of the prefix."
      )
    check(decoder.spec, [ids], tokens=length - len(ids), chunk=chunk)
    rows = decoder.layout.size("batch")
    kept = cache or decoder.precision.compute
    held = make_cache(decoder, rows, slots_for(length), kept)
    held, _ = prefill(decoder, params, held, ([ids] * rows, 0), chunk)
    return cls(tuple(ids), length, held, kept)

  def repeated(
    self, decoder: Decoder, rows: int, longest: int, dtype: str | None
  ) -> PyTree:
    """Returns a cache of so many rows that begin so, up to `longest` positions."""
    if dtype not in (None, self.dtype):
      raise InputError(f"cache: {dtype}, and the prefix was read in {self.dtype}.")
    if longest > self.length:
      raise InputError(
        f"prefix: read for rows of {self.length} positions, and the longest needs "
        f"{longest}."
      )
    return repeated(decoder, rows, self.cache)


def prefill(
  decoder: Decoder,
  params: PyTree,
  cache: PyTree,
  rows: tuple[Sequence[Sequence[int]], int],
  chunk: int,
) -> tuple[PyTree, Array]:
  """Reads rows of ids into a cache that holds so many positions of each already.

  Returns the cache, whose buffers were given away, and the residual stream at the last
  token of each row, [B, 1, D].
  """
  prompts, before = rows
  lengths_B = np.asarray([len(prompt) for prompt in prompts])
  longest = int(lengths_B.max())
  x_B1D = None
  for first in range(0, longest, chunk):
    width = min(max(LEAST, bucket(longest - first)), chunk)
    ids_BT = np.zeros((len(prompts), width), np.int32)
    positions_BT = np.full_like(ids_BT, -1)
    for row, prompt in enumerate(prompts):
      part = prompt[first : first + width]
      ids_BT[row, : len(part)] = part
      positions_BT[row, : len(part)] = before + first + np.arange(len(part))
    ends_B = np.clip(lengths_B - first, 0, width).astype(np.int32)
    cache, x_B1D = _extend(
      decoder, params, cache, (ids_BT, positions_BT, ends_B), x_B1D
    )
  assert x_B1D is not None
  return cache, x_B1D


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 4))
def _extend(
  decoder: Decoder,
  params: PyTree,
  cache: PyTree,
  new: tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B"]],
  x_B1D: Array | None,
) -> tuple[PyTree, Array]:
  ids_BT, positions_BT, ends_B = new
  x_BTD, cache = decoder.apply({"params": params}, ids_BT, positions_BT, cache=cache)
  at_B11 = jnp.maximum(ends_B - 1, 0)[:, None, None]
  last_B1D = jnp.take_along_axis(x_BTD, at_B11, axis=1)
  if x_B1D is not None:
    last_B1D = jnp.where(ends_B[:, None, None] > 0, last_B1D, x_B1D)
  return placed(decoder, cache), last_B1D


def make_cache(
  decoder: Decoder, rows: int, length: int, dtype: str, slack: int = 0
) -> PyTree:
  """Returns an empty cache, split as the decoder's layout says.

  Raises:
    InputError: another dtype than those of `DTYPES`.
  """
  if dtype not in DTYPES:
    raise InputError(f"cache: {dtype!r}; it takes {', '.join(DTYPES)}.")
  return _make_cache(decoder, rows, length, dtype, slack)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _make_cache(
  decoder: Decoder, rows: int, length: int, dtype: str, slack: int
) -> PyTree:
  return placed(decoder, caches.empty(decoder.spec, rows, length, dtype, slack=slack))


def placed(decoder: Decoder, cache: PyTree) -> PyTree:
  """Returns a cache whose rows and heads are split as those of activations."""

  def place(leaf: Array, stacked: bool) -> Array:
    front = ("layers",) if stacked else ()
    axes = (*front, "batch", "kv_heads")
    return decoder.layout.constrain(leaf, *axes, *[None] * (leaf.ndim - len(axes)))

  return {
    "prefix": jax.tree.map(lambda a: place(a, False), cache["prefix"]),
    "layers": jax.tree.map(lambda a: place(a, True), cache["layers"]),
  }


@functools.partial(jax.jit, static_argnums=(0, 1))
def repeated(decoder: Decoder, rows: int, cache: PyTree) -> PyTree:
  """Returns a cache of so many rows, each as the first of another."""

  def repeat(axis: int, leaf: Array) -> Array:
    return jnp.repeat(jax.lax.slice_in_dim(leaf, 0, 1, axis=axis), rows, axis=axis)

  at = {"prefix": 0, "layers": 1}
  trees = {
    name: jax.tree.map(functools.partial(repeat, axis), cache[name])
    for name, axis in at.items()
  }
  return placed(decoder, trees)


def check(
  model: spec.LM,
  prompts: Sequence[Sequence[int]],
  *,
  tokens: int,
  chunk: int = 1,
  before: int = 0,
) -> None:
  """Raises InputError where prompts cannot be read or go on for so many tokens."""
  if not prompts:
    raise InputError("prompts: there is none.")
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise InputError(f"prompt {i} is empty; give it at least the begin token.")
    wrong = [token for token in prompt if not 0 <= token < model.vocab]
    if wrong:
      raise InputError(
        f"prompt {i}: id {wrong[0]} is not in the vocabulary of {model.vocab}."
      )
  for name, n in (("tokens", tokens), ("chunk", chunk)):
    if n < 1:
      raise InputError(f"{name}: {n} is under 1.")
  longest = before + max(map(len, prompts))
  positions = model.positions
  if isinstance(positions, spec.Learned) and longest + tokens - 1 > positions.length:
    raise InputError(
      f"model.positions.length: {positions.length} positions are learned and the "
      f"longest row needs {longest} + {tokens} - 1. Ask for fewer tokens."
    )
  if model.context is not None and longest + tokens - 1 > model.context:
    raise InputError(
      f"tokens: the longest row needs {longest} + {tokens} - 1 positions, and the "
      f"model is made for {model.context}. Shorten the prompt, or ask for fewer tokens."
    )


def bucket(n: int) -> int:
  """Returns the power of two from n on."""
  return 1 << (n - 1).bit_length()


def slots_for(length: int) -> int:
  """Returns a cache length from `length` on, of which each doubling has eight."""
  return whole(length, max(64, bucket(length) // 16))


def whole(n: int, of: int) -> int:
  """Returns the multiple of `of` from n on."""
  return -(-n // of) * of
