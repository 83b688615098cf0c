"""Held-out loss in bits per byte: comparable between tokenizers and compressors.

Every predicted token counts, the end of each document included, and only the bytes of
the text divide: the figure is the length of a code that a decoder could read back.
"""

import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder, head_weight
from jaxlm.ops.losses import LossShape, cross_entropy
from jaxlm.shapes import Array, PyTree

Scores = dict[str, float]


def make_evaluate(
  decoder: Decoder, byte_lengths: np.ndarray, *, chunk: int
) -> Callable[[PyTree, Iterable[dict[str, Array]]], Scores]:
  """Returns a function from parameters and batches to scores over all of the batches.

  `byte_lengths` [V] says how many bytes of text each id stands for. Scores: bits per
  byte, nats per token, accuracy, and the bytes that they rest on; without a byte it
  raises InputError.
  """
  shape = LossShape(decoder.layout, chunk, 0.0, decoder.spec.softcap)
  bytes_V = jnp.asarray(byte_lengths, jnp.float32)

  @jax.jit
  def sums(params: PyTree, batch: dict[str, Array]) -> dict[str, Array]:
    x_BTD, _ = decoder.apply(
      {"params": params}, batch["tokens"], batch["positions"], batch["segments"]
    )
    # Weights may share a conversation's among its tokens; here each token is a token.
    weights_BT = (batch["weights"] > 0).astype(jnp.float32)
    head_DV = head_weight(decoder.spec, params)
    terms = cross_entropy(shape, x_BTD, head_DV, batch["targets"], weights_BT)
    return {
      "nats": terms.total,
      "correct": terms.correct,
      "tokens": jnp.sum(weights_BT),
      "bytes": jnp.sum(jnp.take(bytes_V, batch["targets"]) * weights_BT),
    }

  def evaluate(params: PyTree, batches: Iterable[dict[str, Array]]) -> Scores:
    parts = [jax.device_get(sums(params, batch)) for batch in batches]
    if not any(part["bytes"] > 0 for part in parts):
      raise InputError("data.held_out: the held-out set predicts no byte of text.")
    total = {name: math.fsum(float(p[name]) for p in parts) for name in parts[0]}
    return {
      "held_out/bits_per_byte": total["nats"] / math.log(2) / total["bytes"],
      "held_out/nll": total["nats"] / total["tokens"],
      "held_out/accuracy": total["correct"] / total["tokens"],
      "held_out/bytes": total["bytes"],
    }

  return evaluate
