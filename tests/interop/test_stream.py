import functools
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from interop.goldens import CASES, assert_same_leaves, loaded, opened
from jaxlm.errors import InputError
from jaxlm.interop import stream
from jaxlm.interop.names import entries
from jaxlm.models.decoder import Decoder, axes_of, init
from jaxlm.models.spec import Precision
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout, ShardingRules
from jaxlm.trees import named_leaves
from models.specs import decoder


@functools.cache
def eight(**rules):
  return Layout(make_mesh(Mesh(fsdp=4, tensor=2)), ShardingRules(**rules))


def sharded(name, **precision):
  """Returns the decoder of a case on eight devices; 61 ids and one head stay whole."""
  model = opened(name).model
  heads = () if model.blocks[0].mixer.kv_heads % 2 else ("tensor",)
  return Decoder(model, Precision(**precision), eight(vocab=(), kv_heads=heads))


@pytest.mark.parametrize("name", CASES)
def test_eight_devices_hold_what_one_holds(name):
  made = sharded(name)
  params = opened(name).params(made)
  assert_same_leaves(params, loaded(name))
  boxed = jax.eval_shape(lambda key: init(made, key), jax.random.key(0))
  is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
  axes = named_leaves(axes_of(boxed), is_leaf=is_axes)
  split = 0
  for leaf_name, leaf in named_leaves(params).items():
    assert leaf.sharding == made.layout.sharding(*axes[leaf_name])
    whole = np.asarray(named_leaves(loaded(name))[leaf_name])
    assert len(leaf.addressable_shards) == 8
    for shard in leaf.addressable_shards:
      assert np.array_equal(np.asarray(shard.data), whole[shard.index])
    split += leaf.addressable_shards[0].data.size < leaf.size
  assert split >= 7


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_parameters_can_be_narrower_than_the_file(name):
  params = opened(name).params(sharded(name, params="bfloat16"))
  wide = named_leaves(loaded(name))
  for leaf_name, leaf in named_leaves(params).items():
    assert leaf.dtype == jnp.bfloat16
    narrow = np.asarray(wide[leaf_name]).astype(jnp.bfloat16)
    assert np.array_equal(np.asarray(leaf), narrow)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_every_element_is_told_once(name):
  told = []
  params = opened(name).params(decoder(opened(name).model), told.append)
  assert sum(told) == sum(leaf.size for leaf in jax.tree.leaves(params))
  told.clear()
  assert opened(name).largest_difference(params, told.append) == 0
  assert sum(told) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_mesh_that_does_not_divide_is_refused():
  made = Decoder(opened("llama").model, Precision(), eight())
  with pytest.raises(InputError, match=r"mesh: dimension 61 of .* does not divide by 2"):
    opened("llama").params(made)


def test_the_largest_difference_is_found_in_whatever_leaf():
  leaves = named_leaves(loaded("qwen2"))
  tree = jax.tree.structure(loaded("qwen2"))
  for name, leaf in leaves.items():
    last = (-1,) * leaf.ndim
    other = jax.tree.unflatten(
      tree, (leaves | {name: leaf.at[last].add(0.5)}).values()
    )
    found = opened("qwen2").largest_difference(other)
    assert found == pytest.approx(0.5, rel=1e-5), name


def first(name):
  """Returns the first tensor of a case in its table's order, and the leaves."""
  one = opened(name)
  shapes = stream.shapes_of(loaded(name))
  entry = entries(one.family.hf.table, one.model, shapes)[0]
  return entry, named_leaves(loaded(name))


@pytest.mark.parametrize(
  ("value", "dtype"), [(np.nan, np.float32), (np.inf, np.float32), (7e4, np.float16)]
)
def test_what_is_not_finite_is_not_written(value, dtype):
  entry, leaves = first("llama")
  assert stream.tensor_of(entry, leaves, dtype).dtype == dtype
  (piece,) = entry.pieces
  broken = leaves | {piece.name: leaves[piece.name].at[3, 4].set(value)}
  message = f"^{entry.name}: has a value that is not finite as {np.dtype(dtype).name}"
  with pytest.raises(InputError, match=message):
    stream.tensor_of(entry, broken, dtype)


def test_what_the_file_shifts_is_shifted_in_float32():
  entry, leaves = first("llama")
  shifted = entry._replace(row=entry.row._replace(shift=1.0))
  plain = stream.tensor_of(entry, leaves, np.float32)
  found = stream.tensor_of(shifted, leaves, np.float32)
  assert np.array_equal(found, plain + np.float32(1))


def measured(way):
  """Starts a process that loads 125 million parameters: {figure: bytes} it prints."""
  script = pathlib.Path(__file__).with_name("memory.py")
  command = [sys.executable, str(script), way]
  return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_loading_needs_little_more_memory_than_the_parameters(tmp_path):
  ways = [measured("streamed"), measured("whole")]
  streamed, whole = (
    dict(zip(("params", "leaf", "peak"), map(int, way.communicate()[0].split()), strict=True))
    for way in ways
  )
  megabytes = 2**20
  assert streamed["params"] > 450 * megabytes
  # Beside what the devices hold: one stacked leaf and the tensor that is read into it,
  # which is in the file's pages and in a copy.
  assert streamed["peak"] < streamed["params"] + 3 * streamed["leaf"]
  assert whole["peak"] > 1.8 * whole["params"]
