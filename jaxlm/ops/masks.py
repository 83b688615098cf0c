"""Who may attend to whom, as booleans (True: attend)."""

import jax.numpy as jnp

from jaxlm.shapes import Array, Bool, Int


def attention_mask(
  positions_BT: Int[Array, "B T"],
  key_positions_BS: Int[Array, "B S"],
  *,
  window: int | None,
  segments_BT: Int[Array, "B T"] | None = None,
  key_segments_BS: Int[Array, "B S"] | None = None,
) -> Bool[Array, "B T S"]:
  """Causal by position, within a segment, within a window.

  A query sees keys at its own position and before, at most `window` of them counting
  itself, and none of another segment. Positions count within a segment.
  """
  distance_BTS = positions_BT[:, :, None] - key_positions_BS[:, None, :]
  mask_BTS = distance_BTS >= 0
  if window is not None:
    mask_BTS &= distance_BTS < window
  if segments_BT is not None and key_segments_BS is not None:
    mask_BTS &= segments_BT[:, :, None] == key_segments_BS[:, None, :]
  return jnp.asarray(mask_BTS)
