"""Attention with grouped heads: scores, softcap, bias, mask, softmax, values."""

import jax
import jax.numpy as jnp

from jaxlm.shapes import Array, Bool, Float


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
  """Bounds values smoothly to (-cap, cap): cap * tanh(x / cap); None leaves them."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
  q_BTHK: Float[Array, "B T H K"],
  k_BSGK: Float[Array, "B S G K"],
  v_BSGK: Float[Array, "B S G K"],
  mask_BTS: Bool[Array, "B T S"],
  *,
  scale: float,
  softcap: float | None = None,
  bias_BHTS: Float[Array, "B H T S"] | None = None,
) -> Float[Array, "B T H K"]:
  """Softmax attention; query head h reads key-value head h // (H / G).

  Scores, bias and softmax are float32 whatever the dtype of the inputs. Each query must
  see at least one key.
  """
  B, T, H, K = q_BTHK.shape
  G = k_BSGK.shape[2]
  q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
  scores_BGRTS = scale * jnp.einsum(
    "BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32
  )
  scores_BGRTS = soft_cap(scores_BGRTS, softcap)
  if bias_BHTS is not None:
    scores_BGRTS += bias_BHTS.reshape(scores_BGRTS.shape)
  least = jnp.finfo(jnp.float32).min
  scores_BGRTS = jnp.where(mask_BTS[:, None, None], scores_BGRTS, least)
  weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BSGK.dtype)
  out_BTGRK = jnp.einsum("BGRTS,BSGK->BTGRK", weights_BGRTS, v_BSGK)
  return out_BTGRK.reshape(B, T, H, K)
