"""GPU attention by cuDNN's fused kernel; equal to `ops.attention.attend`.

Through `jax.nn.dot_product_attention`, which knows causality and windows. Documents
that share a row reach it as a mask of T x T booleans a row, so its length is bounded.
"""

from typing import Literal

import jax

from jaxlm.ops.attention import Scoring
from jaxlm.ops.kernels.heads import own_heads
from jaxlm.shapes import Array, Float, Int
from jaxlm.sharding.rules import Layout


def attend_cudnn(
  scoring: Scoring,
  layout: Layout,
  qkv: tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]],
  segments_BT: Int[Array, "B T"],
  *,
  implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T H K"]:
  """Causal attention of sequences over themselves, within segments.

  `implementation` "xla" is for tests where there is no GPU. The scoring has neither
  softcap nor slopes, and the mesh splits no sequence: `choice.py` sees to it.
  """
  rules = layout.rules
  rows = rules.spec(("batch", None))
  queries = rules.spec(("batch", None, "heads", None))
  keys = rules.spec(("batch", None, "kv_heads", None))
  group = qkv[0].shape[2] // qkv[1].shape[2]
  window = None if scoring.window is None else (scoring.window - 1, 0)

  def local(q_BTHK, k_BTGK, v_BTGK, segments_BT):
    k_BTGK, v_BTGK = (
      own_heads(a, q_BTHK.shape[2], rules, group) for a in (k_BTGK, v_BTGK)
    )
    mask_B1TS = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    return jax.nn.dot_product_attention(
      q_BTHK,
      k_BTGK,
      v_BTGK,
      mask=mask_B1TS,
      scale=scoring.scale,
      is_causal=True,
      local_window_size=window,
      implementation=implementation,
    )

  mapped = jax.shard_map(
    local,
    mesh=layout.mesh,
    in_specs=(queries, keys, keys, rows),
    out_specs=queries,
    check_vma=False,
  )
  return mapped(*qkv, segments_BT)
