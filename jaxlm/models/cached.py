"""The keys and values that attention keeps of earlier tokens, as one pytree a layer.

Slot s of a row holds the newest of its positions p with p mod S = s. With as many slots
as positions that is position s itself; with fewer it is a ring, for attention that sees
a window. Which position a slot holds follows from the row's newest position alone, so
nothing else is stored, and a row can be taken back by as many positions as the ring is
longer than the window.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.models import spec as specs
from jaxlm.shapes import Array, Float, Int

NOWHERE = 2**30
"""The position of a slot that holds nothing: behind every query."""


class KVCache(NamedTuple):
  """Keys and values of a layer, in the order in which one token's products read them.

  With scales they are int8, each vector divided by its largest value over 127.
  """

  k_BGKS: Array
  v_BGSK: Array
  k_scale_BGS: Array | None = None
  v_scale_BGS: Array | None = None

  @property
  def slots(self) -> int:
    """Positions of a row that it can hold."""
    return self.k_BGKS.shape[-1]


class Seen(NamedTuple):
  """What the queries of a call may attend to."""

  k_BGKS: Float[Array, "B G K S"]
  v_BGSK: Float[Array, "B G S K"]
  positions_BS: Int[Array, "B S"]
  """NOWHERE where there is nothing."""


def empty(mixer: specs.GQA, batch: int, slots: int, dtype: DTypeLike) -> KVCache:
  """Returns a cache without tokens; with int8 it keeps scales too."""
  G, K = mixer.kv_heads, mixer.head_dim
  k_BGKS = jnp.zeros((batch, G, K, slots), dtype)
  v_BGSK = jnp.zeros((batch, G, slots, K), dtype)
  if dtype != jnp.int8:
    return KVCache(k_BGKS, v_BGSK)
  scale_BGS = jnp.zeros((batch, G, slots), jnp.float32)
  return KVCache(k_BGKS, v_BGSK, scale_BGS, jnp.zeros_like(scale_BGS))


def extend(
  cache: KVCache,
  k_BTGK: Float[Array, "B T G K"],
  v_BTGK: Float[Array, "B T G K"],
  positions_BT: Int[Array, "B T"],
  window: int | None,
) -> tuple[KVCache, Seen]:
  """Returns the cache with these tokens, and what they may see.

  A row's positions grow by one; negative ones are padding, before or after the others,
  which leaves no trace.
  """
  (_, T), S = positions_BT.shape, cache.slots
  last_B = jnp.max(positions_BT, axis=1)
  after = _write(cache, k_BTGK, v_BTGK, positions_BT, last_B)
  if window is None or T == 1 or window + T - 1 <= S:
    return after, _seen(after, k_BTGK.dtype, held(last_B, S))
  # The new tokens push keys out of the ring that the first of them still see.
  first_B = jnp.min(jnp.where(positions_BT < 0, NOWHERE, positions_BT), axis=1)
  before = _seen(cache, k_BTGK.dtype, held(first_B - 1, S))
  k_BGTK, v_BGTK = (_through(cache, jnp.swapaxes(a, 1, 2)) for a in (k_BTGK, v_BTGK))
  k_BGKT = jnp.swapaxes(k_BGTK, 2, 3)
  new = Seen(k_BGKT, v_BGTK, jnp.where(positions_BT < 0, NOWHERE, positions_BT))
  parts = zip(before, new, (3, 2, 1), strict=True)
  return after, Seen(*(jnp.concatenate((a, b), axis) for a, b, axis in parts))


def held(last_B: Int[Array, "B"], slots: int) -> Int[Array, "B S"]:
  """Returns the position in each slot when a row's newest is `last_B`."""
  positions_BS = last_B[:, None] - (last_B[:, None] - jnp.arange(slots)[None]) % slots
  return jnp.where(positions_BS < 0, NOWHERE, positions_BS)


def _write(cache: KVCache, k_BTGK, v_BTGK, positions_BT, last_B) -> KVCache:
  S = cache.slots
  # Of tokens that meet in a slot the newest stays; no slot S takes what is dropped.
  stays_BT = (positions_BT >= 0) & (positions_BT > last_B[:, None] - S)
  slots_BT = jnp.where(stays_BT, positions_BT % S, S)
  rows_B1 = jnp.arange(k_BTGK.shape[0])[:, None]
  put = lambda a, new: a.at[rows_B1, :, slots_BT].set(new, mode="drop")  # noqa: E731
  scales: tuple[Array | None, ...] = (None, None)
  if cache.k_scale_BGS is not None:
    k_BTGK, k_scale_BTG = quantize(k_BTGK)
    v_BTGK, v_scale_BTG = quantize(v_BTGK)
    scales = (put(cache.k_scale_BGS, k_scale_BTG), put(cache.v_scale_BGS, v_scale_BTG))
  k_BTGK, v_BTGK = k_BTGK.astype(cache.k_BGKS.dtype), v_BTGK.astype(cache.v_BGSK.dtype)
  k_BGKS = cache.k_BGKS.at[rows_B1, :, :, slots_BT].set(k_BTGK, mode="drop")
  return KVCache(k_BGKS, put(cache.v_BGSK, v_BTGK), *scales)


def _seen(cache: KVCache, dtype: DTypeLike, positions_BS: Array) -> Seen:
  k_BGKS, v_BGSK = cache.k_BGKS.astype(dtype), cache.v_BGSK.astype(dtype)
  if cache.k_scale_BGS is not None and cache.v_scale_BGS is not None:
    k_BGKS *= cache.k_scale_BGS[:, :, None].astype(dtype)
    v_BGSK *= cache.v_scale_BGS[..., None].astype(dtype)
  return Seen(k_BGKS, v_BGSK, positions_BS)


def quantize(x: Float[Array, "... K"]) -> tuple[Array, Float[Array, "..."]]:
  """Returns int8 and the float32 scale of each vector."""
  scale = jnp.max(jnp.abs(x), axis=-1).astype(jnp.float32) / 127
  divisor = jnp.where(scale > 0, scale, 1)[..., None]
  return jnp.round(x / divisor).astype(jnp.int8), scale


def _through(cache: KVCache, x: Array) -> Array:
  """Returns new keys or values as the cache will give them back."""
  if cache.k_scale_BGS is None:
    return x.astype(cache.k_BGKS.dtype).astype(x.dtype)
  small, scale = quantize(x)
  return small.astype(x.dtype) * scale[..., None].astype(x.dtype)
