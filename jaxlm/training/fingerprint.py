"""A hash of weights, the same however they are sharded."""

import jax
import jax.numpy as jnp
import xxhash

from jaxlm.shapes import Array, PyTree
from jaxlm.sharding.rules import Layout
from jaxlm.trees import named_leaves


def weights_hash(layout: Layout, params: PyTree) -> str:
  """Returns a hash of names, and of the bits of all values at their places."""
  state = xxhash.xxh3_128()
  mixed = jax.jit(lambda p: jax.tree.map(_mixed, p), out_shardings=layout.sharding())
  hashes = jax.device_get(mixed(params))
  for name, value in sorted(named_leaves(hashes).items()):
    state.update(f"{name}={int(value[0])},{int(value[1])};".encode())
  return state.hexdigest()


def _mixed(leaf: Array) -> Array:
  """Returns two sums over the bits of all elements, each stirred with its place."""
  width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
  place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
  for axis in reversed(range(leaf.ndim)):
    along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    place = place + along * jnp.uint32(stride % 2**32)
    stride *= leaf.shape[axis]
  sums = []
  for seed in (0x9E3779B9, 0x85EBCA6B):
    x = _stir(bits ^ _stir(place + jnp.uint32(seed)))
    sums.append(jnp.sum(x, dtype=jnp.uint32))
  return jnp.stack(sums)


def _stir(x: Array) -> Array:
  """Mixes 32 bits (the finalizer of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
