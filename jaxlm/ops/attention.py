"""Attention with grouped heads, in two forms that give the same numbers.

`attend` takes any mask and is the reference; it serves cached decoding. `attend_blocks`
is for a whole sequence: it walks over blocks of queries, sees only the keys that
causality and the window leave, and keeps no score for the backward pass (Rabe & Staats
2021; Dao et al. 2022). Alive at a time are the scores of one block: 128 T a head up to
T = 2,048, and a sixteenth of T squared beyond.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.ops.fusion import unfused
from jaxlm.ops.masks import attention_mask
from jaxlm.shapes import Array, Bool, Float, Int

LEAST = float(np.finfo(np.float32).min)


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
  """Bounds values smoothly to (-cap, cap): cap * tanh(x / cap); None leaves them."""
  return x if cap is None else cap * jnp.tanh(x / cap)


class Scoring(NamedTuple):
  """How queries and keys make scores; hashable."""

  scale: float
  """Factor on the product."""
  softcap: float | None = None
  """Scores are bounded to this by tanh."""
  slopes: tuple[float, ...] | None = None
  """ALiBi: each head's penalty per position of distance."""
  window: int | None = None
  """How many keys a query sees, itself among them."""


def attend(
  scoring: Scoring,
  q_BTHK: Float[Array, "B T H K"],
  k_BSGK: Float[Array, "B S G K"],
  v_BSGK: Float[Array, "B S G K"],
  mask_BTS: Bool[Array, "B T S"],
  distance_BTS: Int[Array, "B T S"],
) -> Float[Array, "B T H K"]:
  """Softmax attention; query head h reads key-value head h // (H / G).

  Scores, bias and softmax are float32 whatever the dtype of the inputs. Each query must
  see at least one key. `distance_BTS` is query position minus key position.
  """
  B, T, H, K = q_BTHK.shape
  G = k_BSGK.shape[2]
  q_BGRTK = jnp.transpose(q_BTHK.reshape(B, T, G, H // G, K), (0, 2, 3, 1, 4))
  scores_BGRTS, _ = _scores(
    scoring, q_BGRTK, jnp.swapaxes(k_BSGK, 1, 2), mask_BTS, distance_BTS
  )
  weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BSGK.dtype)
  out_BTGRK = jnp.einsum("BGRTS,BSGK->BTGRK", weights_BGRTS, v_BSGK)
  return out_BTGRK.reshape(B, T, H, K)


def attend_blocks(
  scoring: Scoring,
  q_BTHK: Float[Array, "B T H K"],
  k_BTGK: Float[Array, "B T G K"],
  v_BTGK: Float[Array, "B T G K"],
  positions_BT: Int[Array, "B T"],
  segments_BT: Int[Array, "B T"],
) -> Float[Array, "B T H K"]:
  """Causal attention of a sequence over itself, within segments.

  Positions must grow by one within a segment, and a segment's tokens stand together, as
  packing leaves them: then no query sees a key that stands after it.
  """
  B, T, H, K = q_BTHK.shape
  G = k_BTGK.shape[2]
  q_BGRTK = jnp.transpose(q_BTHK.reshape(B, T, G, H // G, K), (0, 2, 3, 1, 4))
  k_BGTK, v_BGTK = jnp.swapaxes(k_BTGK, 1, 2), jnp.swapaxes(v_BTGK, 1, 2)
  out_BGRTK: Any = _attend(scoring, q_BGRTK, k_BGTK, v_BGTK, positions_BT, segments_BT)
  return jnp.transpose(out_BGRTK, (0, 3, 1, 2, 4)).reshape(B, T, H, K)


def block_of(length: int) -> int:
  """Returns the queries of a block: 128, or more so that 16 blocks are enough."""
  return max(128, -(-length // 16))


def _scores(scoring: Scoring, q_BGRTK, k_BGSK, mask_BTS, distance_BTS):
  """Returns masked scores, and the softcap's derivative where it has one."""
  scores_BGRTS = scoring.scale * jnp.einsum(
    "BGRTK,BGSK->BGRTS", q_BGRTK, k_BGSK, preferred_element_type=jnp.float32
  )
  slope = None
  if scoring.softcap is not None:
    scores_BGRTS = soft_cap(scores_BGRTS, scoring.softcap)
    slope = 1.0 - jnp.square(scores_BGRTS / scoring.softcap)
  if scoring.slopes is not None:
    _, G, R, _, _ = q_BGRTK.shape
    slopes = np.asarray(scoring.slopes, np.float32).reshape(1, G, R, 1, 1)
    scores_BGRTS -= slopes * distance_BTS[:, None, None].astype(jnp.float32)
  return jnp.where(mask_BTS[:, None, None], scores_BGRTS, LEAST), slope


def _spans(length: int, window: int | None) -> list[tuple[int, int, int]]:
  """Returns (first key, first query, end of both) of each block."""
  block = block_of(length)
  spans = []
  for first in range(0, length, block):
    reach = 0 if window is None else max(first - window + 1, 0)
    spans.append((reach, first, min(first + block, length)))
  return spans


def _block(scoring: Scoring, span, q_BGRTK, k_BGTK, positions_BT, segments_BT):
  """Returns the masked scores of one block and the softcap's derivative."""
  reach, first, end = span
  keys, queries = slice(reach, end), slice(first, end)
  mask_BTS = attention_mask(
    positions_BT[:, queries],
    positions_BT[:, keys],
    window=scoring.window,
    segments_BT=segments_BT[:, queries],
    key_segments_BS=segments_BT[:, keys],
  )
  distance_BTS = positions_BT[:, queries, None] - positions_BT[:, None, keys]
  scores, slope = _scores(
    scoring, q_BGRTK[:, :, :, queries], k_BGTK[:, :, keys], mask_BTS, distance_BTS
  )
  return unfused(scores), slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  scoring: Scoring, q_BGRTK, k_BGTK, v_BGTK, positions_BT, segments_BT
) -> Any:
  inputs = (q_BGRTK, k_BGTK, v_BGTK, positions_BT, segments_BT)
  return _attend_forward(scoring, *inputs)[0]


def _attend_forward(
  scoring: Scoring, q_BGRTK, k_BGTK, v_BGTK, positions_BT, segments_BT
):
  outs, partitions = [], []
  for span in _spans(q_BGRTK.shape[3], scoring.window):
    scores, _ = _block(scoring, span, q_BGRTK, k_BGTK, positions_BT, segments_BT)
    top = jnp.max(scores, axis=-1, keepdims=True)
    exps = unfused(jnp.exp(scores - top))
    total = jnp.sum(exps, axis=-1, keepdims=True)
    out = jnp.einsum(
      "BGRTS,BGSK->BGRTK",
      exps.astype(v_BGTK.dtype),
      v_BGTK[:, :, span[0] : span[2]],
      preferred_element_type=jnp.float32,
    )
    outs.append((out / total).astype(q_BGRTK.dtype))
    partitions.append(jnp.log(total) + top)
  out_BGRTK = jnp.concatenate(outs, axis=3)
  kept = (q_BGRTK, k_BGTK, v_BGTK, positions_BT, segments_BT, out_BGRTK)
  return out_BGRTK, (*kept, jnp.concatenate(partitions, axis=3))


def _attend_backward(scoring: Scoring, kept, dout_BGRTK):
  q_BGRTK, k_BGTK, v_BGTK, positions_BT, segments_BT, out_BGRTK, partition = kept
  exact = {"preferred_element_type": jnp.float32}
  dtype = q_BGRTK.dtype
  weighted = dout_BGRTK.astype(jnp.float32) * out_BGRTK.astype(jnp.float32)
  mean = jnp.sum(weighted, axis=-1, keepdims=True)
  dqs = []
  dk_BGTK = jnp.zeros(k_BGTK.shape, jnp.float32)
  dv_BGTK = jnp.zeros(v_BGTK.shape, jnp.float32)
  for span in _spans(q_BGRTK.shape[3], scoring.window):
    reach, first, end = span
    dout = dout_BGRTK[:, :, :, first:end]
    scores, slope = _block(scoring, span, q_BGRTK, k_BGTK, positions_BT, segments_BT)
    weights = jnp.exp(scores - partition[:, :, :, first:end])
    weights = unfused(weights)
    dv = jnp.einsum("BGRTS,BGRTK->BGSK", weights.astype(dtype), dout, **exact)
    dweights = jnp.einsum("BGRTK,BGSK->BGRTS", dout, v_BGTK[:, :, reach:end], **exact)
    dscores = weights * (dweights - mean[:, :, :, first:end]) * scoring.scale
    if slope is not None:
      dscores *= slope
    dscores = unfused(dscores.astype(dtype))
    dqs.append(jnp.einsum("BGRTS,BGSK->BGRTK", dscores, k_BGTK[:, :, reach:end]))
    dk = jnp.einsum("BGRTS,BGRTK->BGSK", dscores, q_BGRTK[:, :, :, first:end], **exact)
    dk_BGTK = dk_BGTK.at[:, :, reach:end].add(dk)
    dv_BGTK = dv_BGTK.at[:, :, reach:end].add(dv)
  dq_BGRTK = jnp.concatenate(dqs, axis=3)
  return dq_BGRTK, dk_BGTK.astype(dtype), dv_BGTK.astype(dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)
