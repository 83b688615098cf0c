"""Direct preference optimization and its kin: losses of pairs against a reference."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

from jaxlm.errors import InputError, nearest
from jaxlm.posttrain.pairs import (
  Losses,
  Pairs,
  filled,
  of_pairs,
  power,
  require_positive,
  require_smoothing,
  smoothed,
)
from jaxlm.shapes import Array

Kind = Literal[
  "sigmoid",
  "hinge",
  "ipo",
  "ipo_sum",
  "robust",
  "exo",
  "nca",
  "bco",
  "sppo",
  "aot",
  "aot_unpaired",
  "apo_zero",
  "apo_down",
  "discopop",
  "sigmoid_norm",
  "sft",
]

SMOOTHED = ("sigmoid", "robust", "exo", "aot", "aot_unpaired")
"""Kinds that use the smoothing."""
SORTED = ("aot", "aot_unpaired")
"""Kinds that compare values of the same rank, not those of a pair."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPO:
  """Direct preference optimization and its kin, against a reference.

  The kinds, where c and r are the log-ratios of policy to reference of the chosen and
  the rejected, d = beta (c - r), s is the logistic function and e the smoothing:

    sigmoid       -(1 - e) log s(d) - e log s(-d)  (Rafailov et al. 2023; with e it is
                  cDPO, Mitchell 2023)
    sigmoid_norm  the same with c and r as means over tokens, without e
    hinge         max(0, 1 - d)  (Zhao et al. 2023, SLiC)
    ipo           (c - r - 1 / (2 beta))^2 with means over tokens  (Azar et al. 2023)
    ipo_sum       the same with sums
    robust        (-(1 - e) log s(d) + e log s(-d)) / (1 - 2 e)  (Chowdhury et al. 2024)
    exo           KL of (s(d), s(-d)) from (1 - e, e)  (Ji et al. 2024)
    nca           -log s(beta c) - (log s(-beta c) + log s(-beta r)) / 2  (Chen et al.
                  2024)
    bco           -log s(beta c) - log s(-beta r)  (Jung et al. 2024, without its shift)
    sppo          (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2  (Wu et al. 2024)
    aot           sigmoid of the policy's gap less the reference's of the same rank
                  among all pairs  (Melnyk et al. 2024)
    aot_unpaired  sigmoid of c less the r of the same rank
    apo_zero      s(-beta c) + s(beta r)  (D'Oosterlinck et al. 2024)
    apo_down      s(beta c) + s(-d)
    discopop      -(1 - g) log s(d) + g exp(-d), g = s(d / tau)  (Lu et al. 2024)
    sft           the caller's: see `sft_weight`
  """

  losses: tuple[tuple[Kind, float], ...] = (("sigmoid", 1.0),)
  """Kinds and their weights; MPO is (("sigmoid", 0.8), ("bco", 0.2), ("sft", 1.0))."""
  beta: float = 0.1
  """How dearly the policy pays for leaving the reference; rewards are beta times c."""
  smoothing: float = 0.0
  """Assumed share of pairs with the wrong label: for sigmoid, robust, exo and aot."""
  divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
  """What log-ratios are replaced by: the derivative of which divergence (Wang et al.
  2023, f-DPO)."""
  alpha_divergence: float = 0.5
  """The order of the alpha divergence; 1 would be reverse_kl."""
  discopop_tau: float = 0.05
  """Temperature of the switch between discopop's logistic and exponential losses."""
  length_tail: float | None = None
  """LD-DPO: weight of the tokens past the shorter completion of a pair, in the sums of
  policy and reference; the caller applies it. None: 1, all tokens alike."""
  wpo: bool = False
  """Whether a pair is weighted by how likely the policy is to write it (Zhou et al.
  2024): exp of both confidences. The sft part has no such weight."""

  def __post_init__(self):
    kinds = [kind for kind, _ in self.losses]
    for kind, weight in self.losses:
      if kind not in get_args(Kind):
        raise InputError(
          f"objective.losses: {kind!r} is no kind of loss."
          f"{nearest(kind, get_args(Kind))} The kinds are {', '.join(get_args(Kind))}."
        )
      if not 0 < weight < math.inf:
        raise InputError(
          f"objective.losses: the weight {weight} of {kind} is not a positive number."
        )
    if not kinds or len(set(kinds)) < len(kinds):
      raise InputError("objective.losses: takes one kind or more, each at most once.")
    require_positive("beta", self.beta)
    require_smoothing(self.smoothing, SMOOTHED, kinds)
    if "exo" in kinds and self.smoothing == 0:
      raise InputError("objective.smoothing: exo needs one over 0; 0.001 is usual.")
    if self.divergence not in SCORES:
      raise InputError(
        f"objective.divergence: {self.divergence!r} is not one of {', '.join(SCORES)}."
      )
    if not math.isfinite(self.alpha_divergence) or self.alpha_divergence == 1:
      raise InputError(
        f"objective.alpha_divergence: {self.alpha_divergence} is not a number other "
        "than 1, which is divergence=reverse_kl."
      )
    if not 0 < self.discopop_tau <= 1:
      raise InputError(
        f"objective.discopop_tau: {self.discopop_tau} is not above 0 and at most 1."
      )
    if self.length_tail is not None and not 0 <= self.length_tail <= 1:
      raise InputError(
        f"objective.length_tail: {self.length_tail} is not from 0 to 1, nor None."
      )
    self._check_sorted([kind for kind in kinds if kind in SORTED])

  def _check_sorted(self, kinds: list[str]):
    if kinds and self.wpo:
      raise InputError(
        f"objective.wpo: weighs pairs, but {kinds[0]} compares across pairs."
      )
    if "aot" in kinds and self.divergence != "reverse_kl":
      raise InputError(
        "objective.divergence: aot has no log-ratios to replace; it takes reverse_kl."
      )

  @property
  def sft_weight(self) -> float:
    """Weight of the cross-entropy of chosen completions, by tokens: the caller's."""
    return sum(weight for kind, weight in self.losses if kind == "sft")


def dpo(spec: DPO, pairs: Pairs) -> Losses:
  """Returns the weighted losses of each pair, all kinds but sft.

  Metrics: reward_chosen, reward_rejected (beta times the log-ratio), margin (their
  difference), accuracy (1 where it is positive), logp_chosen, logp_rejected (sums).
  """
  pairs = filled(pairs)
  chosen_BU = pairs.chosen.policy - pairs.chosen.reference
  rejected_BU = pairs.rejected.policy - pairs.rejected.reference
  score = SCORES[spec.divergence]
  compared = Compared(pairs, score(spec, chosen_BU), score(spec, rejected_BU))
  loss_BU = jnp.zeros_like(chosen_BU)
  for kind, weight in spec.losses:
    if kind != "sft":
      loss_BU += weight * PAIR_LOSSES[kind](spec, compared)
  if spec.wpo:
    log_weight_BU = pairs.chosen.confidence + pairs.rejected.confidence
    loss_BU *= jnp.exp(jax.lax.stop_gradient(log_weight_BU))
  return of_pairs(loss_BU, spec.beta * chosen_BU, spec.beta * rejected_BU, pairs)


class Compared(NamedTuple):
  """What the losses of DPO's kinds are made of; empty slots are filled."""

  pairs: Pairs
  chosen_BU: Array
  """The log-ratio, or what the divergence makes of it."""
  rejected_BU: Array


SCORES: dict[str, Callable[[DPO, Any], Any]] = {
  "reverse_kl": lambda spec, x_BU: x_BU,
  "forward_kl": lambda spec, x_BU: power(-1.0, x_BU),
  "js": lambda spec, x_BU: math.log(2.0) + log_sigmoid(x_BU),
  "alpha": lambda spec, x_BU: power(spec.alpha_divergence - 1.0, x_BU),
}


def _sigmoid(spec: DPO, at: Compared):
  return smoothed(spec.smoothing, spec.beta * (at.chosen_BU - at.rejected_BU))


def _hinge(spec: DPO, at: Compared):
  return jax.nn.relu(1.0 - spec.beta * (at.chosen_BU - at.rejected_BU))


def _difference_of_means(at: Compared):
  chosen_BU = at.chosen_BU / at.pairs.chosen.length
  return chosen_BU - at.rejected_BU / at.pairs.rejected.length


def _ipo(spec: DPO, at: Compared):
  return jnp.square(_difference_of_means(at) - 0.5 / spec.beta)


def _ipo_sum(spec: DPO, at: Compared):
  return jnp.square(at.chosen_BU - at.rejected_BU - 0.5 / spec.beta)


def _robust(spec: DPO, at: Compared):
  x_BU = spec.beta * (at.chosen_BU - at.rejected_BU)
  right_BU, wrong_BU = log_sigmoid(x_BU), log_sigmoid(-x_BU)
  e = spec.smoothing
  return (e * wrong_BU - (1.0 - e) * right_BU) / (1.0 - 2.0 * e)


def _exo(spec: DPO, at: Compared):
  x_BU = spec.beta * (at.chosen_BU - at.rejected_BU)
  right_BU = sigmoid(x_BU) * (log_sigmoid(x_BU) - math.log1p(-spec.smoothing))
  return right_BU + sigmoid(-x_BU) * (log_sigmoid(-x_BU) - math.log(spec.smoothing))


def _nca(spec: DPO, at: Compared):
  chosen_BU, rejected_BU = spec.beta * at.chosen_BU, spec.beta * at.rejected_BU
  away_BU = log_sigmoid(-chosen_BU) + log_sigmoid(-rejected_BU)
  return -log_sigmoid(chosen_BU) - 0.5 * away_BU


def _bco(spec: DPO, at: Compared):
  right_BU = log_sigmoid(spec.beta * at.chosen_BU)
  return -right_BU - log_sigmoid(-spec.beta * at.rejected_BU)


def _sppo(spec: DPO, at: Compared):
  half = 0.5 / spec.beta
  return jnp.square(at.chosen_BU - half) + jnp.square(at.rejected_BU + half)


def _minus_same_rank(x_BU, y_BU, here_BU):
  """Takes from each x the y of the same rank among all that are here, in its slot."""
  x, y = (jnp.where(here_BU, a, jnp.inf).reshape(-1) for a in (x_BU, y_BU))
  rank = jnp.argsort(jnp.argsort(x))
  matched_BU = jnp.sort(y)[rank].reshape(x_BU.shape)
  return x_BU - jnp.where(here_BU, matched_BU, 0.0)


def _aot(spec: DPO, at: Compared):
  chosen, rejected, present_BU = at.pairs
  policy_BU = chosen.policy - rejected.policy
  reference_BU = chosen.reference - rejected.reference
  x_BU = _minus_same_rank(policy_BU, reference_BU, present_BU > 0.0)
  return smoothed(spec.smoothing, spec.beta * x_BU)


def _aot_unpaired(spec: DPO, at: Compared):
  x_BU = _minus_same_rank(at.chosen_BU, at.rejected_BU, at.pairs.present > 0.0)
  return smoothed(spec.smoothing, spec.beta * x_BU)


def _apo_zero(spec: DPO, at: Compared):
  return sigmoid(-spec.beta * at.chosen_BU) + sigmoid(spec.beta * at.rejected_BU)


def _apo_down(spec: DPO, at: Compared):
  margin_BU = spec.beta * (at.chosen_BU - at.rejected_BU)
  return sigmoid(spec.beta * at.chosen_BU) + sigmoid(-margin_BU)


def _discopop(spec: DPO, at: Compared):
  x_BU = spec.beta * (at.chosen_BU - at.rejected_BU)
  gate_BU = x_BU / spec.discopop_tau
  # One exponential: its factors would be infinite and zero where x is far below 0.
  exponential_BU = jnp.exp(log_sigmoid(gate_BU) - x_BU)
  return exponential_BU - sigmoid(-gate_BU) * log_sigmoid(x_BU)


def _sigmoid_norm(spec: DPO, at: Compared):
  return -log_sigmoid(spec.beta * _difference_of_means(at))


PAIR_LOSSES: dict[str, Callable[[DPO, Compared], Any]] = {
  "sigmoid": _sigmoid,
  "hinge": _hinge,
  "ipo": _ipo,
  "ipo_sum": _ipo_sum,
  "robust": _robust,
  "exo": _exo,
  "nca": _nca,
  "bco": _bco,
  "sppo": _sppo,
  "aot": _aot,
  "aot_unpaired": _aot_unpaired,
  "apo_zero": _apo_zero,
  "apo_down": _apo_down,
  "discopop": _discopop,
  "sigmoid_norm": _sigmoid_norm,
}
