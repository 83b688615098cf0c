"""From rows on the host to global arrays on the mesh."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxlm.errors import InputError
from jaxlm.shapes import Array
from jaxlm.sharding.rules import Layout

HostBatch = dict[str, np.ndarray]


def rows_here(sharding: NamedSharding, shape: tuple[int, int]) -> list[int]:
  """Returns the rows of a global [B, T] array that this process's devices hold."""
  rows: set[int] = set()
  for index in sharding.addressable_devices_indices_map(shape).values():
    assert index is not None
    rows.update(range(*index[0].indices(shape[0])))
  return sorted(rows)


def placer(
  sharding: NamedSharding, shape: tuple[int, int]
) -> Callable[[HostBatch], dict[str, Array]]:
  """Returns a function from this process's rows of a batch to global arrays.

  Arrays are [B, T, ...]; `shape` is (B, T).
  """
  rows = rows_here(sharding, shape)
  local = {row: i for i, row in enumerate(rows)}

  def place(batch: HostBatch) -> dict[str, Array]:
    def one(values: np.ndarray) -> Array:
      def block(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        wanted = range(*index[0].indices(shape[0]))
        return values[[local[row] for row in wanted]][:, index[1]]

      whole = (*shape, *values.shape[2:])
      return jax.make_array_from_callback(whole, sharding, block)

    return {name: one(values) for name, values in batch.items()}

  return place


def check_batch(layout: Layout, batch: int, seq_len: int, micro_batches: int) -> None:
  """Raises InputError where a batch does not divide over the mesh."""
  split = layout.size("batch") * micro_batches
  if batch % split:
    raise InputError(
      f"data.batch: {batch} rows do not divide by {split}, the {layout.size('batch')} "
      f"devices along {layout.rules.batch} times accumulate={micro_batches}. Use a "
      f"multiple of {split}, or a smaller mesh axis."
    )
  for axis in ("sequence", "stream"):
    if seq_len % layout.size(axis):
      raise InputError(
        f"data.seq_len: {seq_len} positions do not divide by {layout.size(axis)}, the "
        f"devices along {getattr(layout.rules, axis)}, the rule of {axis!r}."
      )
