"""Preference optimization without a reference: CPO, SimPO, AlphaPO, ORPO."""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from jaxlm.errors import InputError
from jaxlm.posttrain.pairs import (
  Losses,
  Pairs,
  Sums,
  filled,
  of_pairs,
  power,
  require_at_least_zero,
  require_positive,
  require_smoothing,
  smoothed,
)

Method = Literal["cpo", "hinge", "ipo", "simpo", "alphapo", "orpo"]

NEAREST_TO_CERTAIN = -1e-6
"""Mean log-probabilities above this are taken for it: float32 tells them apart badly,
and the log-odds of a certain completion are infinite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrastive:
  """Preference optimization without a reference; see `cpo`, `simpo`, `alphapo`, `orpo`.

  Each of those functions has the values that its paper published. hinge and ipo are
  variants of cpo. The total is the mean over pairs plus `nll` times the cross-entropy
  of the chosen, which the caller computes over `nll_over`.
  """

  method: Method
  """cpo and hinge compare sums of log-probabilities, the others means over tokens."""
  beta: float
  """Factor of the compared values; for orpo the weight of the odds-ratio loss."""
  nll: float
  """Weight of the cross-entropy of the chosen. CPO and ORPO have 1; pure SimPO and
  AlphaPO have 0, though a trainer that runs them as a kind of CPO may default to 1."""
  gamma: float = 0.0
  """The margin, after beta: the loss is -log s(beta x - gamma). Some trainers ask for
  gamma / beta instead. For simpo and alphapo."""
  smoothing: float = 0.0
  """Assumed share of pairs with the wrong label: for cpo, simpo and alphapo."""
  alpha: float = 0.0
  """AlphaPO's power; towards 0 it becomes simpo."""

  def __post_init__(self):
    if self.method not in get_args(Method):
      raise InputError(
        f"objective.method: {self.method!r} is not one of "
        f"{', '.join(get_args(Method))}."
      )
    require_positive("beta", self.beta)
    require_at_least_zero("nll", self.nll)
    require_at_least_zero("gamma", self.gamma)
    require_smoothing(self.smoothing, ("cpo", "simpo", "alphapo"), [self.method])
    if self.gamma and self.method not in ("simpo", "alphapo"):
      raise InputError(f"objective.gamma: {self.method} has none; it takes 0.")
    if not math.isfinite(self.alpha) or (self.alpha != 0) != (self.method == "alphapo"):
      raise InputError(
        f"objective.alpha: {self.alpha} does not fit {self.method}: alphapo takes a "
        "number other than 0, every other method 0."
      )

  @property
  def nll_over(self) -> Literal["completion", "sequence"]:
    """Tokens that the cross-entropy is the mean over; sequence: prompt + completion."""
    return "sequence" if self.method == "orpo" else "completion"


def cpo(*, beta: float = 0.1, smoothing: float = 0.0, nll: float = 1.0) -> Contrastive:
  """Contrastive preference optimization (Xu et al. 2024)."""
  return Contrastive(method="cpo", beta=beta, smoothing=smoothing, nll=nll)


def simpo(
  *, beta: float = 2.0, gamma: float = 1.0, smoothing: float = 0.0, nll: float = 0.0
) -> Contrastive:
  """SimPO (Meng et al. 2024); with an nll of 1 it is CPO-SimPO."""
  return Contrastive(
    method="simpo", beta=beta, gamma=gamma, smoothing=smoothing, nll=nll
  )


def alphapo(
  *, alpha: float = 0.25, beta: float = 2.5, gamma: float = 0.1, nll: float = 0.0
) -> Contrastive:
  """AlphaPO (Gupta et al. 2025)."""
  return Contrastive(method="alphapo", alpha=alpha, beta=beta, gamma=gamma, nll=nll)


def orpo(*, beta: float = 0.1, nll: float = 1.0) -> Contrastive:
  """Odds ratio preference optimization (Hong et al. 2024); beta is its lambda."""
  return Contrastive(method="orpo", beta=beta, nll=nll)


def contrastive(spec: Contrastive, pairs: Pairs) -> Losses:
  """Returns the loss of each pair, without the cross-entropy of the chosen.

  Metrics are those of `dpo`; the rewards are beta times what is compared.
  """
  pairs = filled(pairs)
  chosen_BU, rejected_BU = (_reward(spec, sums) for sums in pairs[:2])
  x_BU = spec.beta * (chosen_BU - rejected_BU)
  match spec.method:
    case "cpo" | "simpo" | "alphapo":
      loss_BU = smoothed(spec.smoothing, x_BU - spec.gamma)
    case "hinge":
      loss_BU = jax.nn.relu(1.0 - x_BU)
    case "ipo":
      loss_BU = jnp.square(chosen_BU - rejected_BU - 0.5 / spec.beta)
    case "orpo":
      odds_BU = _log_odds(chosen_BU) - _log_odds(rejected_BU)
      loss_BU = -spec.beta * log_sigmoid(odds_BU)
  return of_pairs(loss_BU, spec.beta * chosen_BU, spec.beta * rejected_BU, pairs)


def _reward(spec: Contrastive, sums: Sums):
  """What is compared: the sum or mean of log-probabilities, or AlphaPO's power."""
  match spec.method:
    case "cpo" | "hinge":
      return sums.policy
    case "alphapo":
      return power(-spec.alpha, sums.policy / sums.length)
    case _:
      return sums.policy / sums.length


def _log_odds(a_BU):
  """log(p / (1 - p)) of a = log p < 0."""
  a_BU = jnp.minimum(a_BU, NEAREST_TO_CERTAIN)
  return a_BU - _log1mexp(a_BU)


def _log1mexp(a_BU):
  """log(1 - exp(a)) of a < 0, by whichever form keeps its digits (Maechler 2012)."""
  near_BU = a_BU > -math.log(2.0)
  # Each form is only given arguments at which it and its gradient are finite.
  small_BU = jnp.log(-jnp.expm1(jnp.where(near_BU, a_BU, -1.0)))
  large_BU = jnp.log1p(-jnp.exp(jnp.where(near_BU, -1.0, a_BU)))
  return jnp.where(near_BU, small_BU, large_BU)
