"""Losses of reward models: of pairs of scores, and of the steps of an answer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import log_sigmoid

from jaxlm.errors import InputError
from jaxlm.posttrain.pairs import Losses, masked
from jaxlm.shapes import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BradleyTerry:
  """The chosen answer wins with the logistic function of the difference of rewards."""

  margin: bool = False
  """Whether the data's margin of each pair is taken from the difference (Touvron et al.
  2023, equation 2)."""
  center: float = 0.0
  """Weight of the squared sum of both rewards, which pins their mean to 0; 0.01 is
  usual (Eisenstein et al. 2023)."""

  def __post_init__(self):
    if not 0 <= self.center < math.inf:
      raise InputError(
        f"objective.center: {self.center} is not 0 or a positive number."
      )


def bradley_terry(
  spec: BradleyTerry,
  chosen_BU: Float[Array, "B U"],
  rejected_BU: Float[Array, "B U"],
  margin_BU: Float[Array, "B U"],
  present_BU: Float[Array, "B U"],
) -> Losses:
  """Returns the loss of each pair of scores; empty slots may hold anything.

  Without `spec.margin`, `margin_BU` is not read. Metrics: reward_chosen,
  reward_rejected, margin (their difference), accuracy (1 where it is positive).
  """
  here_BU = present_BU > 0.0
  chosen_BU, rejected_BU, margin_BU = (
    jnp.where(here_BU, a, 0.0) for a in (chosen_BU, rejected_BU, margin_BU)
  )
  ahead_BU = chosen_BU - rejected_BU
  loss_BU = -log_sigmoid(ahead_BU - margin_BU if spec.margin else ahead_BU)
  loss_BU += spec.center * jnp.square(chosen_BU + rejected_BU)
  metrics = {
    "reward_chosen": chosen_BU,
    "reward_rejected": rejected_BU,
    "margin": ahead_BU,
    "accuracy": (ahead_BU > 0.0).astype(ahead_BU.dtype),
  }
  return masked(loss_BU, metrics, here_BU)


def stepwise(
  logits_BTC: Float[Array, "B T C"],
  labels_BT: Int[Array, "B T"],
  weights_BT: Float[Array, "B T"],
) -> Float[Array, "B T"]:
  """Returns the weighted cross-entropy of each token's class: here C counts classes.

  For process reward models: the last token of each step has weight 1 and a label, 0 for
  a wrong step and 1 for a right one. Where the weight is 0 the label may be anything.
  Float32 or wider; the mean divides by the sum of the weights.
  """
  here_BT = weights_BT > 0.0
  wide = np.promote_types(logits_BTC.dtype, np.float32)
  logits_BTC = jnp.where(here_BT[..., None], logits_BTC.astype(wide), 0.0)
  labels_BT1 = jnp.where(here_BT, labels_BT, 0)[..., None]
  log_probs_BTC = jax.nn.log_softmax(logits_BTC)
  nll_BT = -jnp.take_along_axis(log_probs_BTC, labels_BT1, axis=-1)[..., 0]
  return jnp.where(here_BT, nll_BT * weights_BT, 0.0)
