"""TPU attention by JAX's splash kernel; equal to `ops.attention.attend`.

Scores live in the chip's vector memory a tile at a time, and tiles that causality or
the window hide are skipped. Each device works on its own rows and heads. Source: the
Pallas kernel in jax.experimental.pallas.ops.tpu.splash_attention.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)

from jaxlm.ops.attention import KEPT, Scoring
from jaxlm.ops.kernels.heads import own_heads
from jaxlm.shapes import Array, Float, Int
from jaxlm.sharding.rules import Layout

TILE = 128
"""Lengths are multiples of this: the lanes of a TPU's vector unit."""
LARGEST = 1024
"""Queries and keys of a tile at most; more would not fit in the vector memory."""


def attend_splash(
  scoring: Scoring,
  layout: Layout,
  qkv: tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]],
  segments_BT: Int[Array, "B T"],
  *,
  interpret: bool = False,
) -> Float[Array, "B T H K"]:
  """Causal attention of sequences over themselves, within segments.

  `interpret` runs the kernel without a TPU, for tests. T is a multiple of 128, the
  mesh splits no sequence, and the scoring has no ALiBi slopes: `choice.py` sees to it.
  """
  rules = layout.rules
  rows = rules.spec(("batch", None))
  queries = rules.spec(("batch", None, "heads", None))
  keys = rules.spec(("batch", None, "kv_heads", None))
  group = qkv[0].shape[2] // qkv[1].shape[2]

  def local(q_BTHK, k_BTGK, v_BTGK, segments_BT):
    k_BTGK, v_BTGK = (
      own_heads(a, q_BTHK.shape[2], rules, group) for a in (k_BTGK, v_BTGK)
    )
    q_BTHK = (q_BTHK.astype(jnp.float32) * scoring.scale).astype(q_BTHK.dtype)
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q_BTHK, k_BTGK, v_BTGK))
    kernel = _kernel(scoring, q.shape[1], q.shape[2], interpret)

    def row(inputs):
      q_HTK, k_GTK, v_GTK, segments_T = inputs
      ids = kernels.SegmentIds(segments_T, segments_T)
      return kernel(q_HTK, k_GTK, v_GTK, segment_ids=ids)

    # Row by row: the kernel writes each log-partition 128 times, and of a whole batch
    # that would be the largest array of the layer.
    return jnp.swapaxes(jax.lax.map(row, (q, k, v, segments_BT)), 1, 2)

  mapped = jax.shard_map(
    local,
    mesh=layout.mesh,
    in_specs=(queries, keys, keys, rows),
    out_specs=queries,
    check_vma=False,
  )
  return mapped(*qkv, segments_BT)


def _tile(length: int) -> int:
  """Returns the largest tile that divides the length."""
  return max(t for t in range(TILE, LARGEST + 1, TILE) if length % t == 0)


@functools.cache
def _mask(scoring: Scoring, heads: int, length: int) -> Any:
  shape = (length, length)
  if scoring.window is None:
    mask = masks.CausalMask(shape)
  else:
    mask = masks.LocalMask(shape, (scoring.window - 1, 0), 0)
  return masks.MultiHeadMask([mask] * heads)


def _kernel(scoring: Scoring, heads: int, length: int, interpret: bool) -> Any:
  tile = _tile(length)
  sizes = kernels.BlockSizes(
    block_q=tile,
    block_kv=tile,
    block_kv_compute=_tile_of_scores(tile),
    block_q_dkv=tile,
    block_kv_dkv=tile,
    block_kv_dkv_compute=_tile_of_scores(tile),
    block_q_dq=tile,
    block_kv_dq=tile,
  )
  return kernels.make_splash_mha(
    mask=_mask(scoring, heads, length),
    block_sizes=sizes,
    attn_logits_soft_cap=scoring.softcap,
    residual_checkpoint_name=KEPT,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )


def _tile_of_scores(tile: int) -> int:
  return tile // 2 if tile > 512 and tile % 256 == 0 else tile
