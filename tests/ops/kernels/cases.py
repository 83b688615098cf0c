"""Rows of several documents, and attention of each kernel against the reference."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ops.attention import Scoring, attend
from jaxlm.ops.masks import attention_mask

B, T, H, G, K = 2, 256, 4, 2, 64
SEGMENTS = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 1, 2]], T // 4, axis=1))
POSITIONS = jnp.asarray(
  [
    [i % (T // 4) for i in range(T)],
    [*range(3 * T // 4), *range(T // 4)],
  ],
  jnp.int32,
)
TOLERANCE = 2e-5


def inputs(kv_heads: int = G, dtype=jnp.float32):
  """Returns queries, keys and values."""
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((B, T, H, K), (B, T, kv_heads, K), (B, T, kv_heads, K))
  return tuple(
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, shapes, strict=True)
  )


def reference(scoring: Scoring, q, k, v):
  """Returns what a kernel shall equal."""
  mask = attention_mask(
    POSITIONS,
    POSITIONS,
    window=scoring.window,
    segments_BT=SEGMENTS,
    key_segments_BS=SEGMENTS,
  )
  return attend(scoring, q, k, v, mask, POSITIONS[:, :, None] - POSITIONS[:, None])


def values_and_gradients(attention, qkv):
  """Returns the output and the gradients of a sum that weighs every output."""
  weights = jnp.cos(jnp.arange(qkv[0].size, dtype=jnp.float32)).reshape(qkv[0].shape)

  def total(*qkv):
    out = attention(*qkv)
    return jnp.sum(out.astype(jnp.float32) * weights), out

  (_, out), grads = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(
    *qkv
  )
  return (out, *grads)


def difference(found, wanted) -> float:
  """Returns the largest difference, relative to each array's largest value."""
  return max(
    float(jnp.abs(a - b).max() / jnp.abs(b).max())
    for a, b in zip(found, wanted, strict=True)
  )
