"""Caches as pytrees, shaped by the spec."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.models import cached, spec
from jaxlm.shapes import PyTree

EMPTY: dict[type, Callable[..., PyTree]] = {spec.GQA: cached.empty}
"""What makes a mixer's cache, of (mixer, rows, slots, dtype)."""


def empty(
  model: spec.LM, batch: int, length: int, dtype: DTypeLike, *, slack: int = 0
) -> PyTree:
  """Returns a cache for up to `length` positions of each row.

  A layer with a window holds that many positions, and `slack` more: by so many a row
  can be taken back. The dtype int8 keeps a scale a vector beside. Leaves of the scanned
  layers carry these in front, [L, B, ...]; those of the prefix do not.
  """

  def of(block: spec.Block, layers: int | None) -> PyTree:
    make, mixer = EMPTY[type(block.mixer)], block.mixer
    slots = length if mixer.window is None else min(length, mixer.window + slack)
    one = make(mixer, batch, slots, jnp.dtype(dtype))
    if layers is None:
      return one
    return jax.tree.map(lambda a: jnp.zeros((layers, *a.shape), a.dtype), one)

  return {
    "prefix": tuple(of(block, None) for block in model.prefix),
    "layers": tuple(of(block, model.repeats) for block in model.pattern),
  }
