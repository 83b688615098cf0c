"""Cross-entropy from the residual stream to targets, in chunks of positions.

The logits of a whole sequence are never held: each device walks over its own rows a
chunk at a time, and since the loss is a sum, the gradients are made in the same walk,
with no second product. The head is gathered once before the walk and its gradient is
reduced once after it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.ops.attention import soft_cap
from jaxlm.shapes import Array, Float, Int
from jaxlm.sharding.rules import Layout


class LossTerms(NamedTuple):
  """Sums over the weighted tokens of this batch, float32 scalars but for `nll_BT`."""

  total: Float[Array, ""]
  """Cross-entropy in nats plus z_loss times the squared log-partition."""
  nll_BT: Float[Array, "B T"]
  """Cross-entropy of each token in nats, unweighted; carries no gradient."""
  correct: Float[Array, ""]
  """Weighted count of tokens whose target has the largest logit."""


class LossShape(NamedTuple):
  """What the loss is, apart from its arrays; hashable."""

  layout: Layout
  chunk: int
  """Positions of each row that have logits at a time."""
  z_loss: float = 0.0
  """Weight of the squared log-partition (Chowdhery et al. 2022, PaLM)."""
  softcap: float | None = None
  """Logits are bounded to this by tanh."""


def cross_entropy(
  shape: LossShape,
  x_BTD: Float[Array, "B T D"],
  head_DV: Float[Array, "D V"],
  targets_BT: Int[Array, "B T"],
  weights_BT: Float[Array, "B T"],
) -> LossTerms:
  """Returns the weighted sum of next-token losses and its parts.

  Logits, softmax and sums are float32; products are in the dtype of `x_BTD`. Only
  `total` carries a gradient, to `x_BTD` and `head_DV`.
  """
  total, nll_BT, correct = _loss(shape, x_BTD, head_DV, targets_BT, weights_BT)
  return LossTerms(total, *jax.lax.stop_gradient((nll_BT, correct)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(shape: LossShape, x_BTD, head_DV, targets_BT, weights_BT):
  terms, _ = _walk(shape, x_BTD, head_DV, targets_BT, weights_BT, False)
  return terms


def _forward(shape: LossShape, x_BTD, head_DV, targets_BT, weights_BT):
  terms, grads = _walk(shape, x_BTD, head_DV, targets_BT, weights_BT, True)
  return terms, grads


def _backward(shape: LossShape, grads, cotangents):
  scale = cotangents[0]
  dx_BTD, dhead_DV = grads
  return (dx_BTD * scale.astype(dx_BTD.dtype), dhead_DV * scale.astype(dhead_DV.dtype),
          None, None)


_loss.defvjp(_forward, _backward)


def _walk(shape: LossShape, x_BTD, head_DV, targets_BT, weights_BT, with_grads: bool):
  """Runs the walk on each device's rows; sums over devices."""
  layout = shape.layout
  rules = layout.rules
  rows = rules.spec(("batch", "sequence"))
  split_vocab = rules.vocab
  specs = (
    rules.spec(("batch", "sequence", None)),
    PartitionSpec(None, split_vocab),
    rows,
    rows,
  )
  over = rules.batch + rules.sequence

  def local(x_BTD, head_DV, targets_BT, weights_BT):
    head_DV = head_DV.astype(x_BTD.dtype)
    first = 0
    if split_vocab:
      first = jax.lax.axis_index(split_vocab) * head_DV.shape[1]
    terms, grads = _walk_local(
      shape, x_BTD, head_DV, targets_BT - first, weights_BT, with_grads
    )
    total, nll_BT, correct = terms
    terms = (jax.lax.psum(total, over), nll_BT, jax.lax.psum(correct, over))
    if not with_grads:
      return terms, None
    dx_BTD, dhead_DV = grads
    dx_BTD = jax.lax.psum(dx_BTD, split_vocab) if split_vocab else dx_BTD
    return terms, (dx_BTD.astype(x_BTD.dtype), jax.lax.psum(dhead_DV, over))

  out = ((PartitionSpec(), rows, PartitionSpec()), None)
  if with_grads:
    out = (out[0], (specs[0], specs[1]))
  mapped = jax.shard_map(
    local, mesh=layout.mesh, in_specs=specs, out_specs=out, check_vma=False
  )
  terms, grads = mapped(x_BTD, head_DV, targets_BT, weights_BT)
  if with_grads:
    dx_BTD, dhead_DV = grads
    grads = (dx_BTD, dhead_DV.astype(head_DV.dtype))
  return terms, grads


def _walk_local(shape, x_BTD, head_DV, targets_BT, weights_BT, with_grads):
  B, T, D = x_BTD.shape
  C = min(shape.chunk, T)
  pad = -T % C
  chunks = (T + pad) // C

  def split(a):
    a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
    a = a.reshape(B, chunks, C, *a.shape[2:])
    return jnp.moveaxis(a, 1, 0).reshape(chunks, B * C, *a.shape[3:])

  def join(a):
    a = jnp.moveaxis(a.reshape(chunks, B, C, *a.shape[2:]), 0, 1)
    return a.reshape(B, chunks * C, *a.shape[3:])[:, :T]

  def step(carry, chunk):
    total, correct, dhead_DV = carry
    x_ND, targets_N, weights_N = chunk
    terms, grads = _chunk_terms(
      shape, x_ND, head_DV, targets_N, weights_N, with_grads
    )
    if with_grads:
      dhead_DV = dhead_DV + grads[1]
    carry = (total + terms[0], correct + terms[2], dhead_DV)
    return carry, (terms[1], grads[0] if with_grads else None)

  zero = jnp.zeros((), jnp.float32)
  dhead_DV = jnp.zeros(head_DV.shape, jnp.float32) if with_grads else None
  carry, outs = jax.lax.scan(
    step, (zero, zero, dhead_DV), (split(x_BTD), split(targets_BT), split(weights_BT))
  )
  total, correct, dhead_DV = carry
  nll_BT = join(outs[0])
  grads = (join(outs[1]), dhead_DV) if with_grads else None
  return (total, nll_BT, correct), grads


def _chunk_terms(shape, x_ND, head_DV, targets_N, weights_N, with_grads):
  """Loss terms and gradients of one chunk against this device's vocabulary."""
  over = shape.layout.rules.vocab
  V = head_DV.shape[1]
  raw_NV = jnp.dot(x_ND, head_DV, preferred_element_type=jnp.float32)
  logits_NV = soft_cap(raw_NV, shape.softcap)
  here_N = (targets_N >= 0) & (targets_N < V)
  picked_N1 = jnp.clip(targets_N, 0, V - 1)[:, None]
  target_N = jnp.take_along_axis(logits_NV, picked_N1, axis=1)[:, 0]
  target_N = jnp.where(here_N, target_N, 0.0)
  top_N = jnp.max(logits_NV, axis=1)
  if over:
    target_N, top_N = jax.lax.psum(target_N, over), jax.lax.pmax(top_N, over)
  exp_NV = jnp.exp(logits_NV - top_N[:, None])
  sum_N = jnp.sum(exp_NV, axis=1)
  if over:
    sum_N = jax.lax.psum(sum_N, over)
  log_partition_N = jnp.log(sum_N) + top_N
  nll_N = log_partition_N - target_N
  total = jnp.sum(weights_N * (nll_N + shape.z_loss * jnp.square(log_partition_N)))
  correct = jnp.sum(jnp.where(target_N >= top_N, weights_N, 0.0))
  if not with_grads:
    return (total, nll_N, correct), None
  factor_N = weights_N * (1.0 + 2.0 * shape.z_loss * log_partition_N) / sum_N
  hit_NV = (jnp.arange(V)[None, :] == targets_N[:, None]) & here_N[:, None]
  d_NV = exp_NV * factor_N[:, None] - jnp.where(hit_NV, weights_N[:, None], 0.0)
  if shape.softcap is not None:
    d_NV *= 1.0 - jnp.square(logits_NV / shape.softcap)
  d_NV = d_NV.astype(x_ND.dtype)
  dx_ND = jnp.dot(d_NV, head_DV.T, preferred_element_type=jnp.float32)
  dhead_DV = jnp.dot(x_ND.T, d_NV, preferred_element_type=jnp.float32)
  return (total, nll_N, correct), (dx_ND, dhead_DV)
