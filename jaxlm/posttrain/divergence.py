"""How far a student's distribution of the next token is from its teacher's, in nats.

Here p is the teacher, q the student. Nothing is multiplied by the squared temperature.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import InputError
from jaxlm.shapes import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
  """Which divergence, and of which distributions."""

  kind: Literal["forward", "reverse", "jsd"] = "forward"
  """forward is KL(p, q), reverse KL(q, p), jsd the generalized Jensen-Shannon
  divergence beta KL(p, m) + (1 - beta) KL(q, m), with m = beta p + (1 - beta) q
  (Agarwal et al. 2023, GKD)."""
  beta: float = 0.5
  """The teacher's share in the mixture of jsd, between 0 and 1; the others have none.
  At 0 and 1, which are refused, jsd itself is 0; some trainers take 0 there for forward
  and 1 for reverse."""
  temperature: float = 1.0
  """Divides the logits of both."""

  def __post_init__(self):
    if self.kind not in ("forward", "reverse", "jsd"):
      raise InputError(
        f"divergence.kind: {self.kind!r} is not one of forward, reverse, jsd."
      )
    if not 0 < self.beta < 1:
      raise InputError(
        f"divergence.beta: {self.beta} is not between 0 and 1, both left out; for "
        "those see divergence.kind=forward and reverse."
      )
    if not 0 < self.temperature < math.inf:
      raise InputError(
        f"divergence.temperature: {self.temperature} is not a positive number."
      )


def divergence(
  spec: Divergence, student_NV: Float[Array, "... V"], teacher_NV: Float[Array, "... V"]
) -> Float[Array, " ..."]:
  """Returns the divergence at each token from finite logits, in float32 or wider.

  The gradient goes to the student alone.
  """
  q_NV = _log_probs(spec, student_NV)
  p_NV = _log_probs(spec, jax.lax.stop_gradient(teacher_NV))
  match spec.kind:
    case "forward":
      return _kl(p_NV, q_NV)
    case "reverse":
      return _kl(q_NV, p_NV)
    case "jsd":
      share, rest = spec.beta, 1.0 - spec.beta
      mixed_NV = jnp.logaddexp(p_NV + math.log(share), q_NV + math.log(rest))
      return share * _kl(p_NV, mixed_NV) + rest * _kl(q_NV, mixed_NV)


def from_top_k(
  spec: Divergence,
  student_NV: Float[Array, "N V"],
  ids_NK: Int[Array, "N K"],
  log_probs_NK: Float[Array, "N K"],
) -> Float[Array, " N"]:
  """Returns KL(p, q) at each token from the teacher's K largest log-probabilities.

  All ids that are not stored make up one more bucket, with what is left of each
  distribution: so the result is never above that of the whole distributions, equal to
  it where K = V, and the student is not free in how much it gives to the rest. Stored
  values are of the teacher at `spec.temperature`, and unrenormalized; -inf marks an
  unused place. Ids of a token differ. The gradient goes to the student alone.

  Raises:
    InputError: if `spec.kind` is not forward, as the others need all of p.
  """
  if spec.kind != "forward":
    raise InputError(
      f"divergence.kind: {spec.kind} needs the teacher's whole distribution; its top "
      "log-probabilities are enough for forward alone."
    )
  q_NV = _log_probs(spec, student_NV)
  N, V = q_NV.shape
  p_NK = jnp.exp(jax.lax.stop_gradient(log_probs_NK).astype(q_NV.dtype))
  used_NK = p_NK > 0.0
  q_NK = jnp.take_along_axis(q_NV, ids_NK, axis=1)
  kept_N = jnp.sum(_xlogy(p_NK, p_NK) - p_NK * q_NK, axis=1)
  # Summed over the other ids: 1 - sum has no digits left where that is small.
  ids_NK = jnp.where(used_NK, ids_NK, V)
  stored_NV = jnp.zeros((N, V), bool).at[jnp.arange(N)[:, None], ids_NK]
  others_NV = ~stored_NV.set(True, mode="drop")
  rest_N = jnp.maximum(1.0 - jnp.sum(p_NK, axis=1), 0.0)
  rest_N = jnp.where(jnp.any(others_NV, axis=1), rest_N, 0.0)
  # With no other id the sum would be of nothing; its factor is 0 then.
  others_NV |= rest_N[:, None] == 0.0
  log_rest_N = jax.nn.logsumexp(q_NV, axis=1, where=others_NV)
  return kept_N + _xlogy(rest_N, rest_N) - rest_N * log_rest_N


def _log_probs(spec: Divergence, logits_NV) -> Any:
  wide = np.promote_types(logits_NV.dtype, np.float32)
  return jax.nn.log_softmax(logits_NV.astype(wide) / spec.temperature)


def _kl(p_NV, q_NV) -> Any:
  """Of log-probabilities."""
  return jnp.sum(jnp.exp(p_NV) * (p_NV - q_NV), axis=-1)


def _xlogy(x, y) -> Any:
  """x log y, and 0 where x is 0."""
  some = x > 0.0
  return jnp.where(some, x * jnp.log(jnp.where(some, y, 1.0)), 0.0)
