"""The TPU kernel, interpreted, against the reference; compiled where libtpu is here."""

import functools

import jax
import pytest

from jaxlm.ops.attention import Scoring
from jaxlm.ops.kernels import splash
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

SCORINGS = {
  "plain": Scoring(K**-0.5),
  "window": Scoring(K**-0.5, window=100),
  "softcap": Scoring(0.5, softcap=2.0),
}
ONE = Layout(make_mesh(Mesh(), jax.devices()[:1]))


def run(scoring, layout, *qkv):
  return splash.attend_splash(scoring, layout, qkv, SEGMENTS, interpret=True)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_it_equals_the_reference(scoring):
  scoring, qkv = SCORINGS[scoring], inputs()
  found = values_and_gradients(functools.partial(run, scoring, ONE), qkv)
  wanted = values_and_gradients(functools.partial(reference, scoring), qkv)
  assert difference(found, wanted) < TOLERANCE


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_heads_and_rows_split_over_a_mesh(kv_heads):
  """MQA and GQA too, where query heads are split further than key-value heads."""
  scoring, qkv = SCORINGS["plain"], inputs(kv_heads)
  rules = ShardingRules(kv_heads=("tensor",) if kv_heads == 4 else ())
  mesh = make_mesh(Mesh(fsdp=2, tensor=4))
  found = values_and_gradients(
    functools.partial(run, scoring, Layout(mesh, rules)), qkv
  )
  wanted = values_and_gradients(functools.partial(reference, scoring), qkv)
  assert difference(found, wanted) < TOLERANCE


def test_a_kernel_without_segments_is_found_out(monkeypatch):
  """The negative control."""
  same = lambda q, kv: None  # noqa: E731
  monkeypatch.setattr(splash.kernels, "SegmentIds", same)
  scoring, qkv = SCORINGS["plain"], inputs()
  found = values_and_gradients(functools.partial(run, scoring, ONE), qkv)
  wanted = values_and_gradients(functools.partial(reference, scoring), qkv)
  assert difference(found, wanted) > 0.01


@pytest.mark.parametrize(("length", "tile"), [(128, 128), (8192, 1024), (1280, 640)])
def test_a_tile_divides_the_length(length, tile):
  assert splash._tile(length) == tile
  assert tile % splash._tile_of_scores(tile) == 0
