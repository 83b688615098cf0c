"""Sums over the sequences that share packed rows.

Row r holds up to U examples of K sequences each; sequence k of example u has segment
K u + k + 1, so an example lies in one row, whatever the mesh.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlm.ops.losses import LogProbs
from jaxlm.posttrain.pairs import Sums
from jaxlm.shapes import Array, Float, Int
from jaxlm.training.objective import Batch


class Slots(NamedTuple):
  """Where the examples of a batch stand."""

  member_BTS: Float[Array, "B T S"]
  """1 where a position belongs to a sequence, S = U K."""
  sequences: int
  """K."""

  @classmethod
  def of(cls, segments_BT: Int[Array, "B T"], examples: int, sequences: int) -> "Slots":
    """Returns the slots for at most `examples` examples a row."""
    numbers_S = jnp.arange(1, examples * sequences + 1)
    member_BTS = segments_BT[:, :, None] == numbers_S[None, None, :]
    return cls(member_BTS.astype(jnp.float32), sequences)

  def sums(self, values_BT: Float[Array, "B T"]) -> Float[Array, "B U K"]:
    """Returns the sum of values over each sequence."""
    sums_BS = _exact("BT,BTS->BS", values_BT, self.member_BTS)
    return sums_BS.reshape(sums_BS.shape[0], -1, self.sequences)

  def at_tokens(self, values_BUK: Float[Array, "B U K"]) -> Float[Array, "B T"]:
    """Returns each sequence's value at its positions."""
    values_BS = values_BUK.reshape(values_BUK.shape[0], -1)
    return _exact("BS,BTS->BT", values_BS, self.member_BTS)

  def first(self, values_BT: Float[Array, "B T"]) -> Float[Array, "B U"]:
    """Returns what all positions of an example hold, from its first sequence."""
    total_BU = self.sums(values_BT)[:, :, 0]
    count_BU = self.sums(jnp.ones_like(values_BT))[:, :, 0]
    return total_BU / jnp.maximum(count_BU, 1.0)


def _exact(equation: str, values: Array, member_BTS: Array) -> Array:
  """Returns a sum in float32: accelerators would round its factors."""
  return jnp.einsum(equation, values, member_BTS, precision=jax.lax.Precision.HIGHEST)


def completions(
  slots: Slots,
  batch: Batch,
  found: LogProbs,
  *,
  reference: bool,
  tail: float | None = None,
) -> Sums:
  """Returns the sums of every sequence's supervised tokens, [B, U, K].

  Without a reference it is 0. With `tail`, tokens past the
  length of the shortest sequence of an example count by this factor, under policy and
  reference alike (LD-DPO, Liu et al. 2024).
  """
  mask_BT = (batch["weights"] > 0).astype(jnp.float32)
  length_BUK = slots.sums(mask_BT)
  counted_BT = mask_BT
  if tail is not None:
    shortest_BUK = jnp.broadcast_to(
      jnp.min(length_BUK, axis=2, keepdims=True), length_BUK.shape
    )
    past_BT = _place(slots, mask_BT) >= slots.at_tokens(shortest_BUK)
    counted_BT = jnp.where(past_BT, tail, 1.0) * mask_BT
  reference_BT = batch["reference"] if reference else jnp.zeros_like(mask_BT)
  sure_BT = jax.lax.stop_gradient(found.target_BT) - found.spread.log_squares_BT
  return Sums(
    policy=slots.sums(found.target_BT * counted_BT),
    reference=slots.sums(reference_BT * counted_BT),
    length=length_BUK,
    confidence=slots.sums(sure_BT * mask_BT) / jnp.maximum(length_BUK, 1.0),
  )


def _place(slots: Slots, mask_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
  """Returns how many supervised tokens of its sequence come before each position."""
  before_BT = jnp.cumsum(mask_BT, axis=1) - mask_BT
  at_S = jnp.cumsum(slots.sums(mask_BT).reshape(mask_BT.shape[0], -1), axis=1)
  lengths_BS = slots.sums(mask_BT).reshape(mask_BT.shape[0], -1)
  earlier_BUK = (at_S - lengths_BS).reshape(mask_BT.shape[0], -1, slots.sequences)
  return before_BT - slots.at_tokens(earlier_BUK)


def transposed(sums: Sums, k: int) -> Sums:
  """Returns the sums of sequence k of each example, [B, U]."""
  return jax.tree.map(lambda a_BUK: a_BUK[:, :, k], sums)


def spoken(batch: Batch) -> Array:
  """Returns 1.0 where the target goes on with its input's sequence, prompts included.

  The last target of a row stands in no input: it counts where it is supervised, and a
  prompt does not end a row.
  """
  segments_BT = batch["segments"]
  same_BT = (segments_BT[:, :-1] == segments_BT[:, 1:]) & (segments_BT[:, :-1] > 0)
  goes_on_BT = jnp.pad(same_BT, ((0, 0), (0, 1)))
  return (goes_on_BT | (batch["weights"] > 0)).astype(jnp.float32)
