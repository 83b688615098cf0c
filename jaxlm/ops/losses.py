"""Log-probabilities and losses from the residual stream, in chunks of positions.

The logits of a whole sequence are never held: each device walks over its own rows a
chunk at a time, and since the loss is a sum, the gradients are made in the same walk,
with no second product. The head is gathered once before the walk, in the dtype of the
products, and its gradient is summed once after it, each device its own shard.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.ops.attention import soft_cap
from jaxlm.ops.collectives import scatter_sum
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
  spread: "Spread | None" = None
  """Of each token's distribution, where the shape asks for it."""


class Spread(NamedTuple):
  """How wide the distribution of each next token is; carries no gradient."""

  entropy_BT: Float[Array, "B T"]
  """In nats."""
  log_squares_BT: Float[Array, "B T"]
  """Logarithm of the sum of squared probabilities."""


class LogProbs(NamedTuple):
  """Of the targets, in nats, float32."""

  target_BT: Float[Array, "B T"]
  """Log-probability of each target."""
  spread: Spread


class LossShape(NamedTuple):
  """What the loss is, apart from its arrays; hashable."""

  layout: Layout
  chunk: int
  """Positions of each row that have logits at a time."""
  z_loss: float = 0.0
  """Weight of the squared log-partition (Chowdhery et al. 2022, PaLM)."""
  softcap: float | None = None
  """Logits are bounded to this by tanh."""
  temperature: float = 1.0
  """Divides the bounded logits."""
  spread: bool = False
  """Whether entropies are made too."""


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
  terms: LossTerms = _loss(shape, x_BTD, head_DV, targets_BT, weights_BT)
  return LossTerms(terms.total, *jax.lax.stop_gradient(terms[1:]))


def log_probs(
  shape: LossShape,
  x_BTD: Float[Array, "B T D"],
  head_DV: Float[Array, "D V"],
  targets_BT: Int[Array, "B T"],
) -> LogProbs:
  """Returns the log-probability of each target, with a gradient, and the spread.

  What is made of them may be any function: the backward pass walks over the chunks once
  more, so the logits of a whole sequence are never held. `shape.z_loss` is not used.
  """
  shape = shape._replace(z_loss=0.0, spread=True)
  out: Any = _log_probs(shape, x_BTD, head_DV, targets_BT)
  target_BT, spread = out
  return LogProbs(target_BT, jax.lax.stop_gradient(spread))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_probs(shape: LossShape, x_BTD, head_DV, targets_BT) -> Any:
  zeros_BT = jnp.zeros(targets_BT.shape, jnp.float32)
  terms = _walk(shape, x_BTD, head_DV, targets_BT, zeros_BT, grads=False).terms
  return -terms.nll_BT, terms.spread


def _log_probs_forward(shape: LossShape, x_BTD, head_DV, targets_BT):
  out = _log_probs(shape, x_BTD, head_DV, targets_BT)
  return out, (x_BTD, head_DV, targets_BT)


def _log_probs_backward(shape: LossShape, kept, cotangents):
  shape = shape._replace(spread=False)
  x_BTD, head_DV, targets_BT = kept
  weights_BT = -cotangents[0]
  walked = _walk(shape, x_BTD, head_DV, targets_BT, weights_BT, grads=True)
  return walked.dx, walked.dhead, None


_log_probs.defvjp(_log_probs_forward, _log_probs_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(shape: LossShape, x_BTD, head_DV, targets_BT, weights_BT) -> Any:
  return _walk(shape, x_BTD, head_DV, targets_BT, weights_BT, grads=False).terms


def _forward(shape: LossShape, x_BTD, head_DV, targets_BT, weights_BT):
  walked = _walk(shape, x_BTD, head_DV, targets_BT, weights_BT, grads=True)
  return walked.terms, (walked.dx, walked.dhead)


def _backward(_: LossShape, kept, cotangents: LossTerms):
  dx, dhead = (d * cotangents.total.astype(d.dtype) for d in kept)
  return dx, dhead, None, None


_loss.defvjp(_forward, _backward)


class Walked(NamedTuple):
  """What a walk over the chunks gives; the gradients only where they were asked for."""

  terms: LossTerms
  dx: Array | None
  dhead: Array | None


def _walk(
  shape: LossShape, x_BTD, head_DV, targets_BT, weights_BT, *, grads: bool
) -> Walked:
  """Runs the walk on each device's rows and sums over devices."""
  rules = shape.layout.rules
  over = rules.batch + rules.sequence
  rows = rules.spec(("batch", "sequence"))
  residual = rules.spec(("batch", "sequence", None))
  # The gradient lands on the shard of the head, along the axes that split rows as well.
  split = tuple(axis for axis in rules.embed if axis in over)
  rest = tuple(axis for axis in over if axis not in split)
  head = PartitionSpec(split, rules.vocab)
  platform = shape.layout.mesh.devices.flat[0].platform

  def local(x_BTD, head_DV, targets_BT, weights_BT) -> Walked:
    compute_DV = head_DV.astype(x_BTD.dtype)
    if split:
      compute_DV = jax.lax.all_gather(compute_DV, split, axis=0, tiled=True)
    if rules.vocab:
      targets_BT -= jax.lax.axis_index(rules.vocab) * head_DV.shape[1]
    walked = _walk_rows(shape, x_BTD, compute_DV, targets_BT, weights_BT, grads)
    terms = walked.terms._replace(
      total=jax.lax.psum(walked.terms.total, over),
      correct=jax.lax.psum(walked.terms.correct, over),
    )
    if walked.dx is None or walked.dhead is None:
      return Walked(terms, None, None)
    dx = jax.lax.psum(walked.dx, rules.vocab) if rules.vocab else walked.dx
    dhead = walked.dhead
    if split:
      # Done before the layers' backward pass begins: left to itself, the compiler keeps
      # the whole gradient through it, and sums it behind (2 GB at 128k ids).
      dx, dhead = jax.lax.optimization_barrier(
        (dx, scatter_sum(dhead, split, 0, platform))
      )
    dhead = jax.lax.psum(dhead, rest) if rest else dhead
    return Walked(terms, dx.astype(x_BTD.dtype), dhead.astype(head_DV.dtype))

  spread = Spread(rows, rows) if shape.spread else None  # type: ignore[arg-type]
  terms = LossTerms(PartitionSpec(), rows, PartitionSpec(), spread)  # type: ignore[arg-type]
  out = Walked(terms, residual if grads else None, head if grads else None)  # type: ignore[arg-type]
  mapped = jax.shard_map(
    local,
    mesh=shape.layout.mesh,
    in_specs=(residual, head, rows, rows),
    out_specs=out,
    check_vma=False,
  )
  return mapped(x_BTD, head_DV, targets_BT, weights_BT)


def _walk_rows(
  shape: LossShape, x_BTD, head_DV, targets_BT, weights_BT, grads: bool
) -> Walked:
  """Scans over chunks of this device's rows."""
  B, T, _ = x_BTD.shape
  C = min(shape.chunk, T)
  pad = -T % C
  chunks = (T + pad) // C

  def split(a: Array) -> Array:
    a = jnp.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2))
    a = a.reshape(B, chunks, C, *a.shape[2:])
    return jnp.moveaxis(a, 1, 0).reshape(chunks, B * C, *a.shape[3:])

  def join(a: Array) -> Array:
    a = jnp.moveaxis(a.reshape(chunks, B, C, *a.shape[2:]), 0, 1)
    return a.reshape(B, chunks * C, *a.shape[3:])[:, :T]

  def step(sums, chunk):
    terms, dx_ND, dhead_DV = _chunk(shape, chunk, head_DV, grads)
    added = (terms.total, terms.correct, dhead_DV)
    return jax.tree.map(jnp.add, sums, added), (terms.nll_BT, terms.spread, dx_ND)

  zero = jnp.zeros((), jnp.float32)
  dhead_DV = jnp.zeros(head_DV.shape, jnp.float32) if grads else None
  (total, correct, dhead_DV), (nll, spread, dx) = jax.lax.scan(
    step, (zero, zero, dhead_DV), (split(x_BTD), split(targets_BT), split(weights_BT))
  )
  dx_BTD = None if dx is None else join(dx)
  terms = LossTerms(total, join(nll), correct, jax.tree.map(join, spread))
  return Walked(terms, dx_BTD, dhead_DV)


def _chunk(shape: LossShape, chunk, head_DV: Array, grads: bool) -> Walked:
  """Loss terms and gradients of one chunk against this device's vocabulary."""
  x_ND, targets_N, weights_N = chunk
  over = shape.layout.rules.vocab
  V = head_DV.shape[1]
  raw_NV = jnp.dot(x_ND, head_DV, preferred_element_type=jnp.float32)
  capped_NV = soft_cap(raw_NV, shape.softcap)
  logits_NV = capped_NV / shape.temperature
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
  spread = None
  if shape.spread:
    # Against the largest logit, so that nothing overflows: shifted_NV <= 0.
    shifted_NV = logits_NV - top_N[:, None]
    mean_N = jnp.sum(exp_NV * shifted_NV, axis=1)
    squares_N = jnp.sum(jnp.square(exp_NV), axis=1)
    if over:
      mean_N, squares_N = jax.lax.psum((mean_N, squares_N), over)
    entropy_N = jnp.log(sum_N) - mean_N / sum_N
    spread = Spread(entropy_N, jnp.log(squares_N) - 2.0 * jnp.log(sum_N))
  terms = LossTerms(total, nll_N, correct, spread)
  if not grads:
    return Walked(terms, None, None)
  factor_N = weights_N * (1.0 + 2.0 * shape.z_loss * log_partition_N) / sum_N
  hit_NV = (jnp.arange(V)[None, :] == targets_N[:, None]) & here_N[:, None]
  d_NV = exp_NV * factor_N[:, None] - jnp.where(hit_NV, weights_N[:, None], 0.0)
  if shape.softcap is not None:
    d_NV *= 1.0 - jnp.square(capped_NV / shape.softcap)
  d_NV = (d_NV / shape.temperature).astype(x_ND.dtype)
  dx_ND = jnp.dot(d_NV, head_DV.T, preferred_element_type=jnp.float32)
  if not over:
    dx_ND = dx_ND.astype(x_ND.dtype)  # else the sum over the vocabulary comes first
  dhead_DV = jnp.dot(x_ND.T, d_NV, preferred_element_type=jnp.float32)
  return Walked(terms, dx_ND, dhead_DV)
