import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.ops.quantized import (
  DYNAMIC,
  GROUP,
  NF4,
  CodedScales,
  Quantized,
  pack,
  unpack,
)

# bitsandbytes on a matrix of 64 x 128.
GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "goldens/nf4.npz"))
SHAPE = (64, 128)


def golden(case: str) -> jax.Array:
  return jnp.asarray(GOLDEN[f"nf4/{case}"])


def plain() -> Quantized:
  codes = golden("plain/packed").reshape(64, 64)
  return Quantized(codes, golden("plain/absmax").reshape(64, 2), "nf4", "float32")


def nested() -> Quantized:
  codes = golden("nested/absmax").reshape(64, 2)
  scales = CodedScales(codes, golden("nested/absmax2"), golden("nested/offset"))
  return Quantized(golden("nested/packed").reshape(64, 64), scales, "nf4", "float32")


def leaves() -> dict[str, Quantized]:
  """A leaf of each kind, that stands for [3 layers, 4, 8]."""
  rng = np.random.default_rng(0)
  bytes_ = jnp.asarray(rng.integers(0, 256, (3, 4, 8)), jnp.uint8)
  numbers = jnp.asarray(rng.normal(size=(3, 4, 8)), jnp.float32)
  blocks = jnp.abs(numbers[..., ::4])
  coded = CodedScales(bytes_[..., ::4], blocks[:, 0, :1], blocks[:, 0, 0] + 2)
  channels = jnp.abs(numbers[:, :1])
  return {
    "int8 by channel": Quantized(bytes_.astype(jnp.int8), channels, "int8", "float32"),
    "int8 by block": Quantized(bytes_.astype(jnp.int8), blocks, "int8", "float32"),
    "int4": Quantized(bytes_[..., ::2], blocks, "int4", "float32"),
    "nf4": Quantized(bytes_[..., ::2], blocks, "nf4", "float32"),
    "nf4, double": Quantized(bytes_[..., ::2], coded, "nf4", "float32"),
    "fp8": Quantized(numbers.astype(jnp.float8_e4m3fn), blocks, "fp8", "float32"),
  }


KINDS = list(leaves())


def test_the_tables_are_those_of_bitsandbytes():
  np.testing.assert_array_equal(DYNAMIC, GOLDEN["nf4/dynamic_map_8bit"])
  np.testing.assert_array_equal(DYNAMIC, GOLDEN["nf4/nested/code2"])
  np.testing.assert_array_equal(np.array(NF4, np.float32), GOLDEN["nf4/code"])


@pytest.mark.parametrize("case", ["plain", "nested"])
def test_codes_of_bitsandbytes_become_its_weights(case):
  leaf = {"plain": plain, "nested": nested}[case]()
  assert leaf.shape == SHAPE
  np.testing.assert_array_equal(leaf.whole(), GOLDEN[f"nf4/{case}/dequant"])


def test_the_first_of_two_codes_has_the_high_bits():
  codes = jnp.array([[1, 2, 15, 0]], jnp.uint8)
  np.testing.assert_array_equal(pack(codes), [[0x12, 0xF0]])
  np.testing.assert_array_equal(unpack(pack(codes)), codes)


def test_every_code_of_four_bits_has_its_value():
  codes = pack(jnp.arange(16, dtype=jnp.uint8)[None])
  ones = jnp.ones((1, 1))
  whole = Quantized(codes, ones, "nf4", "float32").whole()
  np.testing.assert_array_equal(whole[0], np.array(NF4, np.float32))
  whole = Quantized(codes, ones, "int4", "float32").whole()
  np.testing.assert_array_equal(whole[0], np.arange(-8, 8))


def test_each_group_of_scales_has_its_own():
  scales = GROUP + 8
  codes = jnp.full((1, scales), 255, jnp.uint8)  # all of them 1 in the map
  coded = CodedScales(codes, jnp.array([2.0, 3.0]), jnp.float32(10.0))
  expected = [[12.0] * GROUP + [13.0] * 8]
  np.testing.assert_array_equal(coded.whole(), expected)


@pytest.mark.parametrize("name", KINDS)
def test_it_tells_what_it_stands_for(name):
  leaf = leaves()[name]
  assert (leaf.shape, leaf.ndim, leaf.size) == ((3, 4, 8), 3, 96)
  assert leaf.dtype == "float32"
  assert leaf.nbytes == sum(array.nbytes for array in jax.tree.leaves(leaf))
  assert leaf.whole().shape == leaf.shape
  assert leaf.whole().dtype == jnp.float32
  assert leaf.whole(jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", KINDS)
def test_a_scan_over_layers_meets_leaves_of_one_layer(name):
  leaf = leaves()[name]

  def step(carry, one):
    assert one.shape == (4, 8)
    return carry, one.whole()

  _, found = jax.lax.scan(step, 0, leaf)
  np.testing.assert_allclose(found, leaf.whole(), rtol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_it_goes_through_jit_and_abstract_evaluation(name):
  leaf = leaves()[name]
  found = jax.jit(lambda leaf: leaf.whole())(leaf)
  np.testing.assert_allclose(found, leaf.whole(), rtol=1e-6)
  outline = jax.eval_shape(lambda leaf: leaf, leaf)
  assert (outline.shape, outline.nbytes) == (leaf.shape, leaf.nbytes)


@pytest.mark.parametrize("name", KINDS)
def test_it_has_no_gradient_and_what_it_multiplies_has(name):
  leaf = jax.tree.map(lambda array: array[0], leaves()[name])
  x = jax.random.normal(jax.random.key(0), (2, 4))
  weights = jax.random.normal(jax.random.key(1), (2, 8))

  def total(x, leaf):
    whole = leaf.whole(x.dtype) if isinstance(leaf, Quantized) else leaf
    return jnp.sum(weights * jnp.einsum("BD,DF->BF", x, whole))

  dx, dleaf = jax.jit(jax.grad(total, argnums=(0, 1), allow_int=True))(x, leaf)
  expected, dwhole = jax.jit(jax.grad(total, argnums=(0, 1)))(x, leaf.whole())
  np.testing.assert_allclose(dx, expected, rtol=1e-6)
  assert np.any(dwhole)
  kept = [g for g in jax.tree.leaves(dleaf) if g.dtype != jax.dtypes.float0]
  assert kept
  assert not any(np.any(np.asarray(g, np.float32)) for g in kept)
