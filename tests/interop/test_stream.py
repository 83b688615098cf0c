import functools
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.specs import decoder

from interop.goldens import CASES, assert_same_leaves, loaded, opened
from jaxlm.errors import InputError
from jaxlm.interop import stream
from jaxlm.interop.names import entries
from jaxlm.models.decoder import Decoder, axes_of, init
from jaxlm.models.spec import Precision
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout, ShardingRules
from jaxlm.trees import named_leaves


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
  with pytest.raises(InputError, match=r"dimension 61 of .* does not divide by 2"):
    opened("llama").params(made)


def test_the_largest_difference_is_found_in_whatever_leaf():
  leaves = named_leaves(loaded("qwen2"))
  tree = jax.tree.structure(loaded("qwen2"))
  for name, leaf in leaves.items():
    last = (-1,) * leaf.ndim
    other = jax.tree.unflatten(tree, (leaves | {name: leaf.at[last].add(0.5)}).values())
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


SCRIPT = pathlib.Path(__file__).parents[2] / "experiments/import_memory/measure.py"
SIZE, DTYPE = "stories-110m", "float32"


@pytest.fixture
def measure():
  """The experiment's script, as a module."""
  spec = importlib.util.spec_from_file_location("measure", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_loading_needs_little_more_memory_than_the_parameters(measure, tmp_path):
  measure.write(tmp_path, SIZE, DTYPE)

  def begun(way):
    what = ["--size", SIZE, "--dtype", DTYPE, "--folder", tmp_path, "--step", way]
    command = [sys.executable, SCRIPT, *what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

  with begun("streamed") as one, begun("whole") as other:
    streamed, whole = (json.loads(process.communicate()[0]) for process in (one, other))
  parameters = 109_529_856 * 4
  assert streamed["params"] == whole["params"] == parameters
  # Beside what the devices hold: the stacked leaf that is being filled, one tensor in
  # the file's pages and once more in a copy, and what the allocator keeps of all that.
  assert streamed["peak"] < parameters + streamed["leaf"] + 150 * 2**20
  assert whole["peak"] > 2 * parameters
