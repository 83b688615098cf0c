import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.placement import check_batch, placer, rows_here
from jaxlm.sharding.rules import Layout, ShardingRules

MESHES = [
  Mesh(data=8, fsdp=1),
  Mesh(data=2, fsdp=2, tensor=2),
  Mesh(fsdp=2, context=2, tensor=2),
]


@pytest.mark.parametrize("mesh", MESHES)
def test_a_global_array_equals_the_rows_of_the_host(mesh):
  layout = Layout(make_mesh(mesh))
  sharding = layout.sharding("batch", "sequence")
  rows = rows_here(sharding, (16, 6))
  assert rows == list(range(16))
  batch = {
    "tokens": np.arange(96, dtype=np.int32).reshape(16, 6),
    "weights": np.random.default_rng(0).random((16, 6), np.float32),
  }
  placed = placer(sharding, (16, 6))(batch)
  for name, values in batch.items():
    assert placed[name].sharding == sharding
    assert placed[name].dtype == values.dtype
    np.testing.assert_array_equal(placed[name], values)
    for shard in placed[name].addressable_shards:
      np.testing.assert_array_equal(shard.data, values[shard.index])


class Half:
  """A sharding of which this process holds the devices of the last rows."""

  def addressable_devices_indices_map(self, shape):
    del shape
    return {i: (slice(4 + i, 5 + i), slice(None)) for i in (1, 0, 3, 2, 0)}


def test_only_the_rows_of_this_process_are_asked_for():
  assert rows_here(Half(), (8, 4)) == [4, 5, 6, 7]


def test_a_batch_that_the_mesh_does_not_divide():
  layout = Layout(make_mesh(Mesh(data=2, fsdp=2, tensor=2)))
  check_batch(layout, 8, 5, 2)
  with pytest.raises(
    InputError, match=r"data\.batch: 6 rows do not divide by 4.*'data'"
  ):
    check_batch(layout, 6, 5, 1)
  with pytest.raises(InputError, match=r"data\.batch: 12 rows.*by 8.*accumulate=2"):
    check_batch(layout, 12, 5, 2)
  layout = Layout(make_mesh(Mesh(context=4)), ShardingRules())
  with pytest.raises(InputError, match=r"data\.seq_len: 6 positions.*by 4"):
    check_batch(layout, 8, 6, 1)
