"""Attention with grouped heads, in two forms that give the same numbers.

`attend` takes any mask and is the reference; it serves cached decoding. `attend_blocks`
is for a whole sequence: it walks over blocks of queries, sees only the keys that
causality and the window leave, and keeps no score for the backward pass (Rabe & Staats
2021; Dao et al. 2022). Alive at a time are 128 T scores a head, at any length.
`attend_prefixed` is the same where all rows and segments see a prefix as well.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxlm.ops.fusion import unfused
from jaxlm.ops.masks import attention_mask
from jaxlm.shapes import Array, Bool, Float, Int

LEAST = float(np.finfo(np.float32).min)
QUERIES = 128
"""Queries whose scores are alive at a time."""
KEPT = "attention"
"""The name under which remat policies find what the backward pass needs of a kernel."""


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


class Prefix(NamedTuple):
  """Keys and values that stand in front of every segment of every row.

  They are at positions 0 to S - 1, so a segment's own positions begin at S.
  """

  k_SGK: Float[Array, "S G K"]
  v_SGK: Float[Array, "S G K"]

  @property
  def length(self) -> int:
    """Positions that it takes."""
    return self.k_SGK.shape[0]

  def rows(
    self, batch: int, dtype: DTypeLike
  ) -> tuple[Float[Array, "B S G K"], Float[Array, "B S G K"]]:
    """Returns the keys and the values of so many rows."""
    k, v = (jnp.broadcast_to(a[None].astype(dtype), (batch, *a.shape)) for a in self)
    return k, v

  def positions(self, batch: int) -> Int[Array, "B S"]:
    """Returns the positions of the keys of so many rows."""
    return jnp.tile(jnp.arange(self.length, dtype=jnp.int32)[None], (batch, 1))


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
  k_BGKS, v_BGSK = jnp.transpose(k_BSGK, (0, 2, 3, 1)), jnp.swapaxes(v_BSGK, 1, 2)
  return attend_heads(scoring, q_BTHK, k_BGKS, v_BGSK, mask_BTS, distance_BTS)


def attend_heads(
  scoring: Scoring,
  q_BTHK: Float[Array, "B T H K"],
  k_BGKS: Float[Array, "B G K S"],
  v_BGSK: Float[Array, "B G S K"],
  mask_BTS: Bool[Array, "B T S"],
  distance_BTS: Int[Array, "B T S"],
) -> Float[Array, "B T H K"]:
  """Does as `attend`, keys and values ordered as caches have them.

  Both products are plain ones of matrices, batched over rows and heads: what a CPU does
  three times as fast as the same sums over other orders.
  """
  B, T, H, K = q_BTHK.shape
  (_, G, _, S), R = k_BGKS.shape, H // k_BGKS.shape[1]
  q_BGRTK = jnp.transpose(q_BTHK.reshape(B, T, G, R, K), (0, 2, 3, 1, 4))
  products_BGNS = jnp.matmul(
    q_BGRTK.reshape(B, G, R * T, K), k_BGKS, preferred_element_type=jnp.float32
  )
  products_BGRTS = products_BGNS.reshape(B, G, R, T, S)
  scores_BGRTS, _ = _scores(scoring, products_BGRTS, mask_BTS, distance_BTS)
  weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BGSK.dtype)
  out_BGNK = jnp.matmul(weights_BGRTS.reshape(B, G, R * T, S), v_BGSK)
  out_BTGRK = jnp.transpose(out_BGNK.reshape(B, G, R, T, K), (0, 3, 1, 2, 4))
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
  qkv = _grouped(q_BTHK, k_BTGK, v_BTGK)
  out_BGRTK: Any = _attend(scoring, *qkv, positions_BT, segments_BT)
  return jnp.transpose(out_BGRTK, (0, 3, 1, 2, 4)).reshape(q_BTHK.shape)


def attend_prefixed(
  scoring: Scoring,
  qkv: tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]],
  places: tuple[Int[Array, "B T"], Int[Array, "B T"]],
  prefix: Prefix,
) -> Float[Array, "B T H K"]:
  """Does as `attend_blocks`, with a prefix in front of each segment.

  `places` are positions and segments. What the prefix gives is found apart, S T scores
  a head, and both are weighed by their log-partitions, which is exact.
  """
  grouped = _grouped(*qkv)
  found: Any = _attend_apart(scoring, *grouped, *places)
  out_BGRTK, partition_BGRT1 = found
  look = jax.checkpoint(functools.partial(_look_at, scoring))
  ahead_BGRTK, ahead_BGRT1 = look(grouped[0], places[0], prefix)
  share_BGRT1 = jax.nn.sigmoid(ahead_BGRT1 - partition_BGRT1)
  own_BGRTK = (1.0 - share_BGRT1) * out_BGRTK.astype(jnp.float32)
  out_BGRTK = (own_BGRTK + share_BGRT1 * ahead_BGRTK).astype(out_BGRTK.dtype)
  return jnp.transpose(out_BGRTK, (0, 3, 1, 2, 4)).reshape(qkv[0].shape)


def _grouped(q_BTHK, k_BTGK, v_BTGK):
  (B, T, H, K), G = q_BTHK.shape, k_BTGK.shape[2]
  q_BGRTK = jnp.transpose(q_BTHK.reshape(B, T, G, H // G, K), (0, 2, 3, 1, 4))
  return q_BGRTK, jnp.swapaxes(k_BTGK, 1, 2), jnp.swapaxes(v_BTGK, 1, 2)


def _look_at(scoring: Scoring, q_BGRTK, positions_BT, prefix: Prefix):
  """Returns what queries take from a prefix alone, and their log-partitions.

  All in float32: it is little work, and the keys' gradients are sums over all rows.
  """
  keys_BS = prefix.positions(len(positions_BT))
  mask_BTS = attention_mask(positions_BT, keys_BS, window=scoring.window)
  distance_BTS = positions_BT[:, :, None] - keys_BS[:, None]
  q_BGRTK, k_SGK, v_SGK = (a.astype(jnp.float32) for a in (q_BGRTK, *prefix))
  products_BGRTS = jnp.einsum("BGRTK,SGK->BGRTS", q_BGRTK, k_SGK)
  scores_BGRTS, _ = _scores(scoring, products_BGRTS, mask_BTS, distance_BTS)
  weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1)
  out_BGRTK = jnp.einsum("BGRTS,SGK->BGRTK", weights_BGRTS, v_SGK)
  return out_BGRTK, jax.nn.logsumexp(scores_BGRTS, axis=-1, keepdims=True)


def block_of(length: int) -> int:
  """Returns the queries of a block, a multiple of 128 so that 16 blocks are enough.

  The blocks of a program are written out one by one, each with the keys that it sees;
  inside a block a loop runs over 128 queries at a time.
  """
  return QUERIES * max(1, -(-length // (16 * QUERIES)))


def _scores(scoring: Scoring, products_BGRTS, mask_BTS, distance_BTS):
  """Returns masked scores, and the softcap's derivative where it has one."""
  scores_BGRTS = scoring.scale * products_BGRTS
  slope = None
  if scoring.softcap is not None:
    scores_BGRTS = soft_cap(scores_BGRTS, scoring.softcap)
    slope = 1.0 - jnp.square(scores_BGRTS / scoring.softcap)
  if scoring.slopes is not None:
    _, G, R, _, _ = products_BGRTS.shape
    slopes = np.asarray(scoring.slopes, np.float32).reshape(1, G, R, 1, 1)
    scores_BGRTS -= slopes * distance_BTS[:, None, None].astype(jnp.float32)
  return jnp.where(mask_BTS[:, None, None], scores_BGRTS, LEAST), slope


def _spans(length: int, window: int | None) -> list[tuple[int, int, int]]:
  """Returns (first key, first query, end of both) of each block."""
  block = block_of(length)
  spans = []
  for first in range(0, length, block):
    reach = 0 if window is None else max(first - window + 1, 0)
    end = min(first + block, length)
    whole = first + (end - first) // QUERIES * QUERIES
    spans += [
      (reach, *part) for part in ((first, whole), (whole, end)) if part[0] < part[1]
    ]
  return spans


def _block(scoring: Scoring, block: "_Queries", keys: "_Keys"):
  """Returns the masked scores of some queries and the softcap's derivative."""
  mask_BTS = attention_mask(
    block.positions_BT,
    keys.positions_BS,
    window=scoring.window,
    segments_BT=block.segments_BT,
    key_segments_BS=keys.segments_BS,
  )
  distance_BTS = block.positions_BT[:, :, None] - keys.positions_BS[:, None]
  products = jnp.einsum(
    "BGRTK,BGSK->BGRTS",
    block.q_BGRTK,
    keys.k_BGSK,
    preferred_element_type=jnp.float32,
  )
  scores, slope = _scores(scoring, products, mask_BTS, distance_BTS)
  return unfused(scores), slope


class _Queries(NamedTuple):
  """What is told of queries; some fields for the backward pass alone."""

  q_BGRTK: Array
  positions_BT: Array
  segments_BT: Array
  partition_BGRT1: Any = None
  mean_BGRT1: Any = None
  dout_BGRTK: Any = None

  def part(self, first: int, end: int) -> "_Queries":
    """Returns some of the queries."""
    cut = lambda a: a[:, first:end] if a.ndim == 2 else a[:, :, :, first:end]  # noqa: E731
    return jax.tree.map(cut, self)

  def split(self) -> "_Queries":
    """Returns the queries as a stack of blocks of 128, for a loop."""

    def stack(a: Array) -> Array:
      axis = 1 if a.ndim == 2 else 3
      blocks = a.shape[axis] // QUERIES
      a = a.reshape(*a.shape[:axis], blocks, QUERIES, *a.shape[axis + 1 :])
      return jnp.moveaxis(a, axis, 0)

    return jax.tree.map(stack, self)


class _Keys(NamedTuple):
  """Keys and values that a block of queries sees."""

  k_BGSK: Array
  v_BGSK: Array
  positions_BS: Array
  segments_BS: Array

  def part(self, first: int, end: int) -> "_Keys":
    """Returns some of the keys."""
    cut = lambda a: a[:, first:end] if a.ndim == 2 else a[:, :, first:end]  # noqa: E731
    return jax.tree.map(cut, self)


def _joined(blocks_NBGRTK: Array) -> Array:
  """Puts a stack of blocks back in a row."""
  a = jnp.moveaxis(blocks_NBGRTK, 0, 3)
  return a.reshape(*a.shape[:3], -1, a.shape[-1])


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
  queries = _Queries(q_BGRTK, positions_BT, segments_BT)
  keys = _Keys(k_BGTK, v_BGTK, positions_BT, segments_BT)
  for reach, first, end in _spans(q_BGRTK.shape[3], scoring.window):
    seen = keys.part(reach, end)
    block = queries.part(first, end)
    if end - first <= QUERIES:
      out, partition = _values(scoring, block, seen)
    else:
      stacks = jax.lax.map(lambda b, k=seen: _values(scoring, b, k), block.split())
      out, partition = (_joined(stack) for stack in stacks)
    outs.append(out)
    partitions.append(partition)
  out_BGRTK = checkpoint_name(jnp.concatenate(outs, axis=3), KEPT)
  partition_BGRT1 = checkpoint_name(jnp.concatenate(partitions, axis=3), KEPT)
  kept = (q_BGRTK, k_BGTK, v_BGTK, positions_BT, segments_BT, out_BGRTK)
  return out_BGRTK, (*kept, partition_BGRT1)


def _values(scoring: Scoring, block: _Queries, keys: _Keys) -> tuple[Array, Array]:
  """Returns what some queries take from the values, and their log-partitions."""
  scores, _ = _block(scoring, block, keys)
  top = jnp.max(scores, axis=-1, keepdims=True)
  exps = unfused(jnp.exp(scores - top))
  total = jnp.sum(exps, axis=-1, keepdims=True)
  out = jnp.einsum(
    "BGRTS,BGSK->BGRTK",
    exps.astype(keys.v_BGSK.dtype),
    keys.v_BGSK,
    preferred_element_type=jnp.float32,
  )
  return (out / total).astype(block.q_BGRTK.dtype), jnp.log(total) + top


def _attend_backward(scoring: Scoring, kept, dout_BGRTK, dpartition_BGRT1=None):
  q_BGRTK, k_BGTK, v_BGTK, positions_BT, segments_BT, out_BGRTK, partition = kept
  weighted = dout_BGRTK.astype(jnp.float32) * out_BGRTK.astype(jnp.float32)
  mean = jnp.sum(weighted, axis=-1, keepdims=True)
  if dpartition_BGRT1 is not None:
    mean -= dpartition_BGRT1
  places = (positions_BT, segments_BT)
  queries = _Queries(q_BGRTK, *places, partition, mean, dout_BGRTK)
  keys = _Keys(k_BGTK, v_BGTK, *places)
  dqs = []
  dk_BGTK = jnp.zeros(k_BGTK.shape, jnp.float32)
  dv_BGTK = jnp.zeros(v_BGTK.shape, jnp.float32)
  for reach, first, end in _spans(q_BGRTK.shape[3], scoring.window):
    seen, block = keys.part(reach, end), queries.part(first, end)
    if end - first <= QUERIES:
      (dk, dv), dq = _gradients(scoring, block, seen)
    else:

      def add(sums, block, seen=seen):
        of_keys, dq = _gradients(scoring, block, seen)
        return jax.tree.map(jnp.add, sums, of_keys), dq

      zero = jnp.zeros(seen.k_BGSK.shape, jnp.float32)
      (dk, dv), stack = jax.lax.scan(add, (zero, zero), block.split())
      dq = _joined(stack)
    dqs.append(dq)
    dk_BGTK = dk_BGTK.at[:, :, reach:end].add(dk)
    dv_BGTK = dv_BGTK.at[:, :, reach:end].add(dv)
  dq_BGRTK = jnp.concatenate(dqs, axis=3)
  dtype = q_BGRTK.dtype
  return dq_BGRTK, dk_BGTK.astype(dtype), dv_BGTK.astype(dtype), None, None


def _gradients(scoring: Scoring, block: _Queries, keys: _Keys):
  """Returns the parts of dk and dv that some queries make, and their own dq."""
  exact = {"preferred_element_type": jnp.float32}
  dtype, dout = block.q_BGRTK.dtype, block.dout_BGRTK
  scores, slope = _block(scoring, block, keys)
  weights = unfused(jnp.exp(scores - block.partition_BGRT1))
  dv = jnp.einsum("BGRTS,BGRTK->BGSK", weights.astype(dtype), dout, **exact)
  dweights = jnp.einsum("BGRTK,BGSK->BGRTS", dout, keys.v_BGSK, **exact)
  dscores = weights * (dweights - block.mean_BGRT1) * scoring.scale
  if slope is not None:
    dscores *= slope
  dscores = unfused(dscores.astype(dtype))
  dq = jnp.einsum("BGRTS,BGSK->BGRTK", dscores, keys.k_BGSK)
  dk = jnp.einsum("BGRTS,BGRTK->BGSK", dscores, block.q_BGRTK, **exact)
  return (dk, dv), dq


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_apart(
  scoring: Scoring, q_BGRTK, k_BGTK, v_BGTK, positions_BT, segments_BT
) -> Any:
  inputs = (q_BGRTK, k_BGTK, v_BGTK, positions_BT, segments_BT)
  return _apart_forward(scoring, *inputs)[0]


def _apart_forward(scoring: Scoring, *inputs):
  out_BGRTK, kept = _attend_forward(scoring, *inputs)
  return (out_BGRTK, kept[-1]), kept


def _apart_backward(scoring: Scoring, kept, cotangents):
  return _attend_backward(scoring, kept, *cotangents)


_attend_apart.defvjp(_apart_forward, _apart_backward)
