"""What a loss is: a numerator, a denominator and metrics, summed before dividing."""

import dataclasses
from typing import NamedTuple, Protocol

import jax.numpy as jnp

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, head_weight
from jaxlm.ops.losses import LossShape, cross_entropy
from jaxlm.shapes import Array, Float, PyTree

Batch = dict[str, Array]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken:
  """Cross-entropy of the next token, weighted by `weights` of the batch."""

  z_loss: float = 0.0
  """Weight of the squared log-partition in the loss; 1e-4 is usual."""
  chunk: int = 128
  """Positions of each row whose logits are held at a time."""

  def __post_init__(self):
    if self.chunk < 1:
      raise InputError(f"objective.chunk: {self.chunk} is not positive.")
    if self.z_loss < 0:
      raise InputError(f"objective.z_loss: {self.z_loss} is negative.")


def next_token(spec: NextToken, decoder: Decoder) -> Objective:
  """Returns the objective over tokens, targets, segments, positions and weights.

  All are [B, T]; metrics are the loss without z-loss in nats per token and the share of
  tokens whose target had the largest logit.
  """
  shape = LossShape(decoder.layout, spec.chunk, spec.z_loss, decoder.spec.softcap)

  def objective(params: PyTree, batch: Batch, rng: Array) -> Terms:
    del rng
    x_BTD, _ = decoder.apply(
      {"params": params}, batch["tokens"], batch["positions"], batch["segments"]
    )
    weights_BT = batch["weights"]
    head_DV = head_weight(decoder.spec, params)
    terms = cross_entropy(shape, x_BTD, head_DV, batch["targets"], weights_BT)
    tokens = jnp.sum(weights_BT)
    metrics = {
      "nll": Ratio(jnp.sum(terms.nll_BT * weights_BT), tokens),
      "accuracy": Ratio(terms.correct, tokens),
      "padding": Ratio(
        jnp.sum(batch["segments"] == 0, dtype=jnp.float32),
        jnp.asarray(weights_BT.size, jnp.float32),
      ),
    }
    return Terms(terms.total, tokens, metrics)

  return objective
