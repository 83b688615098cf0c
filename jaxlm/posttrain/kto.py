"""Kahneman-Tversky optimization: losses of single completions, labelled good or bad."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import sigmoid

from jaxlm.errors import InputError
from jaxlm.posttrain.pairs import (
  Losses,
  masked,
  require_at_least_zero,
  require_positive,
)
from jaxlm.shapes import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTO:
  """Kahneman-Tversky optimization: completions labelled good or bad, without pairs.

  Ethayarajh et al. 2024. Desirable and undesirable weights are best chosen so that
  weight times count of the desirable is 1 to 4/3 times that of the undesirable.
  """

  method: Literal["kto", "apo_zero_unpaired"] = "kto"
  """apo_zero_unpaired (D'Oosterlinck et al. 2024) has 0 for the baseline."""
  beta: float = 0.1
  """How dearly the policy pays for leaving the reference."""
  desirable: float = 1.0
  """Weight of the desirable examples."""
  undesirable: float = 1.0
  """Weight of the undesirable examples."""

  def __post_init__(self):
    if self.method not in ("kto", "apo_zero_unpaired"):
      raise InputError(
        f"objective.method: {self.method!r} is not one of kto, apo_zero_unpaired."
      )
    require_positive("beta", self.beta)
    require_at_least_zero("desirable", self.desirable)
    require_at_least_zero("undesirable", self.undesirable)


def kto(
  spec: KTO,
  policy: Float[Array, "B U"],
  reference: Float[Array, "B U"],
  label: Float[Array, "B U"],
  present: Float[Array, "B U"],
  kl: Float[Array, ""],
) -> Losses:
  """Returns the loss of each example; a `label` of 1 is desirable, 0 undesirable.

  `kl` is what `kl_baseline` gives; apo_zero_unpaired does not use it. Metrics:
  reward_chosen and logp_chosen are 0 but at desirable examples, reward_rejected and
  logp_rejected but at undesirable ones, so each mean divides by its own count;
  desirable is 1 at the former; accuracy says whether the reward is on the label's side
  of the baseline.
  """
  here_BU = present > 0.0
  policy, reference, label = (
    jnp.where(here_BU, a, 0.0) for a in (policy, reference, label)
  )
  good_BU = label > 0.5
  ratio_BU = policy - reference
  if spec.method == "apo_zero_unpaired":
    kl = jnp.zeros_like(kl)
  x_BU = spec.beta * (ratio_BU - kl)
  good_loss_BU = spec.desirable * sigmoid(-x_BU)
  bad_loss_BU = spec.undesirable * sigmoid(x_BU)
  loss_BU = jnp.where(good_BU, good_loss_BU, bad_loss_BU)
  metrics = {
    "accuracy": ((x_BU > 0.0) == good_BU).astype(x_BU.dtype),
    "desirable": good_BU.astype(x_BU.dtype),
  }
  for name, of_BU in (("chosen", good_BU), ("rejected", ~good_BU)):
    metrics[f"reward_{name}"] = jnp.where(of_BU, spec.beta * ratio_BU, 0.0)
    metrics[f"logp_{name}"] = jnp.where(of_BU, policy, 0.0)
  return masked(loss_BU, metrics, here_BU)


def kl_baseline(total: Float[Array, ""], count: Float[Array, ""]) -> Float[Array, ""]:
  """Returns KTO's reference point: the mean log-ratio of mismatched pairs, 0 or more.

  `total` and `count` are sums over all devices; no gradient passes.
  """
  return jax.lax.stop_gradient(jnp.maximum(total / jnp.maximum(count, 1.0), 0.0))
