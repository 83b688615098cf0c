"""Units of preference, one a slot of [B, U], and what their losses share.

A row of a batch has U slots for units: pairs of completions, or single examples. Empty
slots may hold anything, NaN included: their loss, metrics and gradients are zero.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from jaxlm.errors import InputError
from jaxlm.shapes import Array, Float

LARGEST_EXPONENT = 80.0
"""Exponents are cut here: float32 holds exp(80) and its products with a loss."""


class Sums(NamedTuple):
  """Of one completion a slot, over its tokens."""

  policy: Float[Array, "B U"]
  """Log-probability under the policy, in nats. For LD-DPO the tail has its weight."""
  reference: Float[Array, "B U"]
  """The same under the reference; zeros where a method needs none."""
  length: Float[Array, "B U"]
  """Tokens of the completion."""
  confidence: Float[Array, "B U"]
  """Mean over tokens of log-probability minus the log of the sum of squared
  probabilities; only WPO reads it, and no gradient passes."""


class Pairs(NamedTuple):
  """Chosen and rejected completions of the same prompt."""

  chosen: Sums
  rejected: Sums
  present: Float[Array, "B U"]
  """1 where the slot has a pair, 0 where it is empty."""


class Losses(NamedTuple):
  """Of each slot; 0 where it is empty, so sums over slots can be divided later."""

  loss: Float[Array, "B U"]
  metrics: dict[str, Float[Array, "B U"]]
  """Without gradient."""


def require_positive(field: str, value: float):
  """Refuses a field of an objective that is not over 0 and finite."""
  if not 0 < value < math.inf:
    raise InputError(f"objective.{field}: {value} is not a positive number.")


def require_at_least_zero(field: str, value: float):
  """Refuses a field of an objective that is negative or not finite."""
  if not 0 <= value < math.inf:
    raise InputError(f"objective.{field}: {value} is not 0 or a positive number.")


def require_smoothing(smoothing: float, users: Collection[str], kinds: Collection[str]):
  """Refuses a share out of range, and one that none of the kinds in use reads."""
  if not 0 <= smoothing < 0.5:
    raise InputError(f"objective.smoothing: {smoothing} is not from 0 to under 0.5.")
  if smoothing and not set(users) & set(kinds):
    raise InputError(
      f"objective.smoothing: {', '.join(kinds)} has none; it is for {', '.join(users)}."
    )


def filled(pairs: Pairs) -> Pairs:
  """Puts values at which every loss and its gradient is finite into empty slots."""
  here_BU = pairs.present > 0.0
  safe = Sums(policy=-1.0, reference=-1.0, length=1.0, confidence=0.0)  # type: ignore[arg-type]

  def fill(sums: Sums) -> Sums:
    sums = Sums(*(jnp.where(here_BU, a, b) for a, b in zip(sums, safe, strict=True)))
    return sums._replace(length=jnp.maximum(sums.length, 1.0))

  return Pairs(fill(pairs.chosen), fill(pairs.rejected), pairs.present)


def of_pairs(loss_BU: Any, chosen_BU: Any, rejected_BU: Any, pairs: Pairs) -> Losses:
  """Adds the metrics to the losses, given both rewards [B, U]."""
  margin_BU = chosen_BU - rejected_BU
  metrics = {
    "reward_chosen": chosen_BU,
    "reward_rejected": rejected_BU,
    "margin": margin_BU,
    "accuracy": (margin_BU > 0.0).astype(margin_BU.dtype),
    "logp_chosen": pairs.chosen.policy,
    "logp_rejected": pairs.rejected.policy,
  }
  return masked(loss_BU, metrics, pairs.present > 0.0)


def masked(loss_BU: Any, metrics: dict[str, Array], here_BU: Any) -> Losses:
  """Clears the slots where there is no unit, and detaches the metrics."""
  metrics = jax.lax.stop_gradient(metrics)
  return Losses(*jax.tree.map(lambda a: jnp.where(here_BU, a, 0.0), (loss_BU, metrics)))


def smoothed(smoothing: float, x_BU: Any) -> Any:
  """Binary cross-entropy of a logit whose label is wrong by the share `smoothing`."""
  return -(1.0 - smoothing) * log_sigmoid(x_BU) - smoothing * log_sigmoid(-x_BU)


def power(order: float, x_BU: Any) -> Any:
  """(exp(order x) - 1) / order, which is x where the order goes to 0."""
  return jnp.expm1(jnp.minimum(order * x_BU, LARGEST_EXPONENT)) / order
