"""Which key-value heads a device needs for its query heads."""

import jax

from jaxlm.shapes import Array, Float
from jaxlm.sharding.rules import ShardingRules


def own_heads(
  a_BTGK: Float[Array, "B T G K"], queries: int, rules: ShardingRules, group: int
) -> Float[Array, "B T _ K"]:
  """Returns the heads that `queries` query heads of this device read; in shard_map.

  All of them where both kinds are split alike. Where query heads are split further,
  the devices that share key-value heads pick their own; `group` is query heads per
  key-value head.
  """
  apart = tuple(axis for axis in rules.heads if axis not in rules.kv_heads)
  if not apart:
    return a_BTGK
  first = jax.lax.axis_index(apart) * queries // group
  return jax.lax.dynamic_slice_in_dim(a_BTGK, first, max(1, queries // group), axis=2)
