"""What JAX is given for cuDNN, in JAX's own XLA form, against the reference."""

import functools

import pytest

from jaxlm.ops.attention import Scoring
from jaxlm.ops.kernels import cudnn
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout, ShardingRules
from ops.kernels.cases import (
  SEGMENTS,
  TOLERANCE,
  K,
  difference,
  inputs,
  reference,
  values_and_gradients,
)

SCORINGS = {"plain": Scoring(K**-0.5), "window": Scoring(0.3, window=50)}


@pytest.mark.parametrize("scoring", SCORINGS)
def test_it_equals_the_reference(scoring):
  scoring, qkv = SCORINGS[scoring], inputs()
  layout = Layout(
    make_mesh(Mesh(fsdp=2, tensor=4)), ShardingRules(kv_heads=(), heads=("tensor",))
  )

  def run(*qkv):
    return cudnn.attend_cudnn(scoring, layout, qkv, SEGMENTS, implementation="xla")

  found = values_and_gradients(run, qkv)
  wanted = values_and_gradients(functools.partial(reference, scoring), qkv)
  assert difference(found, wanted) < TOLERANCE
