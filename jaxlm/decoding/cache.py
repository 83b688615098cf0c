"""Caches as pytrees, shaped by the spec."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.models import spec
from jaxlm.models.attention import KVCache
from jaxlm.shapes import PyTree


def empty(model: spec.LM, batch: int, length: int, dtype: DTypeLike) -> PyTree:
  """Returns zeros for `length` positions of each row.

  Leaves of the scanned layers carry them in front: [L, B, S, G, K]; those of the prefix
  are [B, S, G, K].
  """

  def of(block: spec.Block, layers: tuple[int, ...]) -> KVCache:
    mixer = block.mixer
    shape = (*layers, batch, length, mixer.kv_heads, mixer.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

  return {
    "prefix": tuple(of(block, ()) for block in model.prefix),
    "layers": tuple(of(block, (model.repeats,)) for block in model.pattern),
  }
