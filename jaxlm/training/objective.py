"""What a loss is: a numerator, a denominator and metrics, summed before dividing."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, head_weight
from jaxlm.ops.losses import LossShape, cross_entropy, log_probs
from jaxlm.shapes import Array, Float, PyTree

Batch = dict[str, Any]
"""Arrays [B, T, ...]; under `shared`, sums over the whole batch of a step; under
`frozen`, by name, parameters that the step reads and does not train."""
Sums = dict[str, Array]


class Ratio(NamedTuple):
  """A metric as two sums, so that micro-batches and devices add up."""

  numerator: Float[Array, ""]
  denominator: Float[Array, ""]


class Terms(NamedTuple):
  """What an objective returns for a batch; the loss is numerator / denominator."""

  numerator: Float[Array, ""]
  denominator: Float[Array, ""]
  metrics: dict[str, Ratio]


class Objective(Protocol):
  """An algorithm: a differentiable sum over a batch, and what to divide it by."""

  def __call__(self, params: PyTree, batch: Batch, rng: Array) -> Terms:
    """Returns the sums of this batch."""
    ...


class Field(NamedTuple):
  """An array of a batch that no row of the data holds, [B, T, *inner]."""

  name: str
  dtype: str = "float32"
  inner: tuple[int, ...] = ()


class Frozen(NamedTuple):
  """Parameters that a step reads and does not train."""

  name: str
  """Under which a batch has them."""
  shapes: PyTree
  """A ShapeDtypeStruct with its sharding for each."""


class Task(NamedTuple):
  """An objective, and what it needs beyond the rows of a micro-batch."""

  objective: Objective
  shared: Callable[[PyTree, Batch], Sums] | None = None
  """Sums that a loss takes of the whole batch, without gradient. Where a step has
  several micro-batches they come first, and the objective finds them in the batch; else
  it makes them of its own batch."""
  fields: tuple[Field, ...] = ()
  """What was computed ahead, beside the data."""
  frozen: tuple[Frozen, ...] = ()


BASE = "base"
"""The name of the frozen parameters beside which others train."""


def over_base(
  task: Task, attach: Callable[[PyTree, PyTree, Array | None], PyTree], *, draws: bool
) -> Task:
  """Returns the task of parameters that train beside those that a batch has as `BASE`.

  `attach` makes of both what the model takes; with `draws` it has a key for its own,
  apart from those of the objective.
  """

  def whole(params: PyTree, batch: Batch, key: Array | None) -> PyTree:
    return attach(jax.lax.stop_gradient(batch["frozen"][BASE]), params, key)

  def objective(params: PyTree, batch: Batch, rng: Array) -> Terms:
    key = jax.random.fold_in(rng, 1) if draws else None
    return task.objective(whole(params, batch, key), batch, rng)

  def shared(params: PyTree, batch: Batch) -> Sums:
    assert task.shared is not None
    return task.shared(whole(params, batch, None), batch)

  return task._replace(objective=objective, shared=task.shared and shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
  """Cross-entropy of the next token, weighted by `weights` of the batch."""

  z_loss: float = 0.0
  """Weight of the squared log-partition in the loss; 1e-4 is usual."""
  chunk: int = 128
  """Positions of each row whose logits are held at a time."""
  neftune: float = 0.0
  """Size of the noise on embeddings while training: uniform within this over the root
  of a sequence's length times the width (Jain et al. 2023); 5 is usual, 0 is none. The
  length is the sequence's own, so packing changes nothing."""
  dft: bool = False
  """Whether each token's loss is weighted by its probability, without gradient (Wu et
  al. 2025)."""

  def __post_init__(self):
    if self.chunk < 1:
      raise InputError(f"objective.chunk: {self.chunk} is not positive.")
    if self.z_loss < 0:
      raise InputError(f"objective.z_loss: {self.z_loss} is negative.")
    if self.neftune < 0:
      raise InputError(f"objective.neftune: {self.neftune} is negative.")
    if self.dft and self.z_loss:
      raise InputError("objective.z_loss: with dft it must be 0.")


def next_token(spec: NextToken, decoder: Decoder) -> Objective:
  """Returns the objective over tokens, targets, segments, positions and weights.

  All are [B, T]; metrics are the loss without z-loss in nats per token and the share of
  tokens whose target had the largest logit.
  """
  shape = LossShape(decoder.layout, spec.chunk, spec.z_loss, decoder.spec.softcap)

  def objective(params: PyTree, batch: Batch, rng: Array) -> Terms:
    noise_BTD = None
    if spec.neftune:
      noise_BTD = neftune(spec.neftune, batch["segments"], decoder.spec.dim, rng)
    x_BTD, _ = decoder.apply(
      {"params": params},
      batch["tokens"],
      batch["positions"],
      batch["segments"],
      noise_BTD=noise_BTD,
    )
    weights_BT = batch["weights"]
    head_DV = head_weight(decoder.spec, params)
    tokens = jnp.sum(weights_BT)
    padding = Ratio(
      jnp.sum(batch["segments"] == 0, dtype=jnp.float32),
      jnp.asarray(weights_BT.size, jnp.float32),
    )
    if spec.dft:
      logp_BT = log_probs(shape, x_BTD, head_DV, batch["targets"]).target_BT
      trust_BT = jnp.exp(jax.lax.stop_gradient(logp_BT))
      nll = Ratio(jnp.sum(-jax.lax.stop_gradient(logp_BT) * weights_BT), tokens)
      total = jnp.sum(-logp_BT * trust_BT * weights_BT)
      return Terms(total, tokens, {"nll": nll, "padding": padding})
    terms = cross_entropy(shape, x_BTD, head_DV, batch["targets"], weights_BT)
    metrics = {
      "nll": Ratio(jnp.sum(terms.nll_BT * weights_BT), tokens),
      "accuracy": Ratio(terms.correct, tokens),
      "padding": padding,
    }
    return Terms(terms.total, tokens, metrics)

  return objective


def neftune(
  size: float, segments_BT: Array, dim: int, rng: Array
) -> Float[Array, "B T D"]:
  """Returns noise on embeddings, uniform within size / sqrt(length x dim)."""
  B, T = segments_BT.shape

  def lengths(segments_T: Array) -> Array:
    return jnp.bincount(segments_T, length=T + 1)[segments_T]

  length_BT = jnp.maximum(jax.vmap(lengths)(segments_BT), 1).astype(jnp.float32)
  within_BT = size / jnp.sqrt(length_BT * dim)
  noise_BTD = jax.random.uniform(rng, (B, T, dim), jnp.float32, -1.0, 1.0)
  return noise_BTD * within_BT[:, :, None]
