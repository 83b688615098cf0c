"""Logits to a token: temperature, then top-k, then top-p, then a draw."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlm.errors import InputError
from jaxlm.shapes import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the next token is chosen."""

  temperature: float = 1.0
  """Logits are divided by this; 0 takes the largest (greedy)."""
  top_k: int | None = None
  """Only the so many largest logits can be drawn; None: all."""
  top_p: float | None = None
  """Only the fewest tokens that hold this probability can be drawn; None: all."""

  def __post_init__(self):
    if self.temperature < 0:
      raise InputError(f"temperature: {self.temperature} is negative; 0 is greedy.")
    if self.top_k is not None and self.top_k < 1:
      raise InputError(f"top_k: {self.top_k} is under 1; none allows all.")
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise InputError(f"top_p: {self.top_p} is not in (0, 1]; none allows all.")


def allow_top_k(logits_BV: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
  """Sets all but the k largest logits of each row to -inf; ties at the edge stay."""
  least = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1:]
  return jnp.where(logits_BV < least, -jnp.inf, logits_BV)


def allow_top_p(logits_BV: Float[Array, "B V"], p: float) -> Float[Array, "B V"]:
  """Sets logits outside the nucleus to -inf (Holtzman et al. 2019).

  A token stays if those more probable hold less than p; the likeliest always stays,
  and so do ties at the edge.
  """
  ordered_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  probability_BV = jax.nn.softmax(ordered_BV, axis=-1)
  before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
  kept_B = jnp.maximum(jnp.sum(before_BV < p, axis=-1), 1)
  least = jnp.take_along_axis(ordered_BV, kept_B[:, None] - 1, axis=-1)
  return jnp.where(logits_BV < least, -jnp.inf, logits_BV)


def sample(
  sampling: Sampling, logits_BV: Float[Array, "B V"], keys_B: Array
) -> Int[Array, "B"]:
  """Returns a token for each row, drawn with that row's own key."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV / sampling.temperature
  if sampling.top_k is not None:
    logits_BV = allow_top_k(logits_BV, sampling.top_k)
  if sampling.top_p is not None:
    logits_BV = allow_top_p(logits_BV, sampling.top_p)
  return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)
