"""Sums that each device keeps a part of: the same in pieces and at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxlm.ops.collectives import PIECE, scatter_sum
from jaxlm.sharding.mesh import Mesh, make_mesh


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("width", [48, 2048, PIECE, PIECE + 100])
def test_a_part_of_the_sum(platform, dim, width):
  mesh = make_mesh(Mesh(data=2, fsdp=4))
  axes = ("fsdp", "data")
  shape = (8, 16, width) if dim == 0 else (8, width, 16)
  x = jax.random.normal(jax.random.key(0), shape)
  parts = [axes, None] if dim == 0 else [None, axes]
  scattered = jax.shard_map(
    lambda x: scatter_sum(x[0], axes, dim, platform),
    mesh=mesh,
    in_specs=PartitionSpec(axes),
    out_specs=PartitionSpec(*parts),
    check_vma=False,
  )
  np.testing.assert_allclose(
    jax.jit(scattered)(x), jnp.sum(x, axis=0), rtol=1e-5, atol=1e-5
  )
