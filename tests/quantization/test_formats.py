import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.ops.quantized import DYNAMIC, CodedScales, unpack
from jaxlm.ops.quantized import NF4 as NF4_VALUES
from jaxlm.quantization.formats import (
  FP8,
  NF4,
  Int4,
  Int8,
  bits_per_parameter,
  quantize,
)

# bitsandbytes on a matrix of 64 x 128.
GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "goldens/nf4.npz"))
FORMATS = {
  "int8 by channel": Int8(),
  "int8 by block": Int8(block=8),
  "int4": Int4(block=8),
  "nf4": NF4(block=8, double=False),
  "nf4, double": NF4(block=8),
  "fp8 by channel": FP8(),
  "fp8 by block": FP8(block=8),
}
SHAPE = (6, 4, 16)


def some(shape: tuple[int, ...] = SHAPE) -> jax.Array:
  return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("jitted", [False, True])
def test_codes_and_scales_are_those_of_bitsandbytes(jitted):
  """The mean of 128 scales, and what hangs on it, but for the order of its sum."""
  weight = jnp.asarray(GOLDEN["nf4/in/W"])
  for case in ("plain", "nested"):
    fn = functools.partial(quantize, NF4(double=case == "nested"), inputs=1)
    leaf = (jax.jit(fn) if jitted else fn)(weight)
    assert isinstance(leaf.scales, CodedScales) == (case == "nested")
    found: dict = {"packed": leaf.codes, "absmax": leaf.scales}
    close = {"dequant": leaf.whole()}
    if isinstance(leaf.scales, CodedScales):
      found["absmax"] = leaf.scales.codes
      close |= {"absmax2": leaf.scales.groups, "offset": leaf.scales.offset}
    for key, value in found.items():
      golden = GOLDEN[f"nf4/{case}/{key}"]
      np.testing.assert_array_equal(np.ravel(value), golden.ravel(), key)
    for key, value in close.items():
      golden = GOLDEN[f"nf4/{case}/{key}"]
      rtol = 0 if case == "plain" else 1e-6
      np.testing.assert_allclose(value, golden, rtol=rtol, err_msg=key)


def test_bits_per_parameter_are_those_that_are_stored():
  bits = functools.partial(bits_per_parameter, inputs=1)
  shape = (4096, 4096)
  assert bits(NF4(double=False), shape) == 4.5
  offset = 32 / 4096**2
  assert bits(NF4(), shape) == 4 + 8 / 64 + 32 / (64 * 256) + offset
  assert round(bits(NF4(), shape), 3) == 4.127
  assert bits(Int4(block=32), shape) == 5
  assert bits(Int8(), shape) == bits(FP8(), shape) == 8 + 32 / 4096
  assert bits_per_parameter(Int8(), (2, 4, 8), inputs=1, stacked=1) == 8 + 32 / 4
  leaf = quantize(NF4(), jnp.asarray(GOLDEN["nf4/in/W"]), inputs=1)
  assert bits(NF4(), leaf.shape) == 8 * leaf.nbytes / leaf.size


def columns(leaf) -> np.ndarray:
  """A leaf's scales, one for each number of the weight, outputs as one dim."""
  shape = (*leaf.codes.shape[:-1], leaf.size // math.prod(leaf.codes.shape[:-1]))
  scales = np.repeat(leaf.scales, shape[-1] // leaf.scales.shape[-1], axis=-1)
  return np.broadcast_to(scales, shape)


@pytest.mark.parametrize("name", ["int8 by channel", "int8 by block", "int4"])
def test_whole_numbers_are_within_half_a_step(name):
  weight = some()
  leaf = quantize(FORMATS[name], weight, inputs=2)
  error = np.abs(leaf.whole() - weight) / columns(leaf)
  assert np.max(error) <= 0.5 + 1e-5
  assert np.max(error) > 0.4
  codes = leaf.codes if leaf.code == "int8" else unpack(leaf.codes).astype(int) - 8
  assert np.max(np.abs(codes)) == (127 if leaf.code == "int8" else 7)


@pytest.mark.parametrize("name", ["fp8 by channel", "fp8 by block"])
def test_fp8_is_the_nearest(name):
  weight = some()
  leaf = quantize(FORMATS[name], weight, inputs=2)
  units = np.asarray(weight) / columns(leaf)
  nearest = np.clip(units, -448, 448).astype(ml_dtypes.float8_e4m3fn)
  np.testing.assert_array_equal(
    np.asarray(leaf.codes, np.float32), nearest.astype(np.float32)
  )
  assert np.max(np.abs(nearest.astype(np.float32))) == 448
  # Three bits after the first: half a step is at most 1/16, or 2^-10 near zero.
  error = np.abs(np.asarray(leaf.whole()) / columns(leaf) - units)
  assert np.all(error <= np.maximum(np.abs(units) / 16, 2.0**-10) * 1.001)


def test_nf4_is_the_nearest_of_its_values():
  weight = some()
  leaf = quantize(FORMATS["nf4"], weight, inputs=1)
  assert leaf.shape == SHAPE
  units = np.asarray(weight).reshape(6, 64) / columns(leaf)
  distance = np.abs(units[..., None] - np.array(NF4_VALUES, np.float32))
  np.testing.assert_array_equal(unpack(leaf.codes), distance.argmin(-1))


def test_a_scale_belongs_to_an_output_or_to_a_block():
  assert quantize(Int8(), some(), inputs=2).scales.shape == (1, 1, 16)
  assert quantize(Int8(), some(), inputs=1).scales.shape == (1, 64)
  assert quantize(Int8(), some(), inputs=1, stacked=1).scales.shape == (6, 1, 16)
  assert quantize(Int8(block=4), some(), inputs=1).scales.shape == (6, 16)
  leaf = quantize(Int8(), some(), inputs=1, stacked=1)
  assert isinstance(leaf.scales, jax.Array)
  expected = np.max(np.abs(some()), axis=1, keepdims=True) / 127
  np.testing.assert_allclose(leaf.scales, expected, rtol=1e-6)


def test_a_tie_goes_to_the_even_number_and_to_the_lower_value():
  weight = jnp.array([[127.0, 0.5, 1.5, -2.5]])
  leaf = quantize(Int8(block=4), weight, inputs=1)
  np.testing.assert_array_equal(leaf.codes, [[127, 0, 2, -2]])
  table = np.array(NF4_VALUES, np.float32)
  middles = (table[:-1] + table[1:]) / np.float32(2)
  leaf = quantize(NF4(block=16), jnp.asarray([[1.0, *middles]]), inputs=1)
  np.testing.assert_array_equal(unpack(leaf.codes), [[15, *range(15)]])


@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-42])
@pytest.mark.parametrize("name", FORMATS)
def test_a_block_of_zeros_stays_one(name, value):
  """And numbers too small to divide by become zeros."""
  weight = some((1, 1, 16)) * jnp.repeat(jnp.array([0.0, 1.0]), 8)[None, None]
  weight = jnp.where(weight == 0, value, weight)
  for one in (weight, jnp.full((1, 1, 16), value)):
    whole = np.asarray(quantize(FORMATS[name], one, inputs=2).whole())
    assert np.all(np.isfinite(whole))
    assert np.all(np.abs(whole[..., :8]) <= 2 * value)


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_of_a_stack_is_quantized_as_if_alone(name):
  scales = jnp.array([1.0, 5.0, 0.1, 2.0, 3.0, 4.0])[:, None, None]
  weight = some() * scales
  stack = quantize(FORMATS[name], weight, inputs=1, stacked=1)
  for layer in range(SHAPE[0]):
    one = jax.tree.map(lambda array, layer=layer: array[layer], stack)
    alone = quantize(FORMATS[name], weight[layer], inputs=1)
    assert jax.tree.structure(one) == jax.tree.structure(alone)
    np.testing.assert_array_equal(one.codes, alone.codes)
    assert one.shape == SHAPE[1:]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(alone), strict=True):
      assert (a.shape, a.dtype) == (b.shape, b.dtype)
      if a.dtype == jnp.float32:
        np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(one.whole(), alone.whole(), rtol=1e-6)


def test_scales_are_grouped_within_a_layer():
  """300 scales a layer: a whole group of 256 and a rest, twice."""
  weight = some((2, 30, 80)) * jnp.array([1.0, 100.0])[:, None, None]
  leaf = quantize(NF4(block=8), weight, inputs=1, stacked=1)
  absmax = np.max(np.abs(weight.reshape(2, 300, 8)), axis=-1)
  offset = absmax.mean(-1)
  centred = absmax - offset[:, None]
  groups = np.abs(np.stack([centred[:, :256], centred[:, 256:].repeat(6, 1)[:, :256]]))
  assert isinstance(leaf.scales, CodedScales)
  assert leaf.scales.shape == (2, 30, 10)
  np.testing.assert_allclose(leaf.scales.offset, offset, rtol=1e-6)
  np.testing.assert_allclose(leaf.scales.groups, groups.max(-1).T, rtol=1e-5)
  # A code is off by half its distance to the next: at most 0.0071 of the group's most.
  error = np.abs(np.asarray(leaf.scales.whole()).reshape(2, 300) - absmax)
  most = np.repeat(np.asarray(leaf.scales.groups), 256, axis=1)[:, :300]
  assert np.all(error <= np.max(np.diff(DYNAMIC)) / 2 * most * 1.001)


def test_a_scale_far_under_the_mean_sets_its_group_s():
  weight = jnp.where(jnp.arange(64) < 8, 0.5, 8.0)[None]
  leaf = quantize(NF4(block=8), weight, inputs=1)
  assert isinstance(leaf.scales, CodedScales)
  np.testing.assert_allclose(leaf.scales.groups, [7.0625 - 0.5], rtol=1e-6)
  assert leaf.scales.codes[0, 0] == 0  # the lowest of the map


@pytest.mark.parametrize("name", FORMATS)
def test_it_works_under_jit_and_keeps_the_dtype(name):
  weight = some().astype(jnp.bfloat16)
  fn = functools.partial(quantize, FORMATS[name], inputs=2)
  leaf, other = fn(weight), jax.jit(fn)(weight)
  assert leaf.dtype == other.dtype == "bfloat16"
  assert leaf.whole().dtype == jnp.bfloat16
  assert leaf.shape == other.shape == SHAPE
  np.testing.assert_allclose(
    np.asarray(leaf.whole(), np.float32), np.asarray(other.whole(), np.float32), 1e-2
  )


@pytest.mark.parametrize(
  ("act", "message"),
  [
    (lambda: Int4(block=0), "Int4.block: 0 is under 1"),
    (lambda: NF4(block=-64), "NF4.block: -64 is under 1"),
    (lambda: quantize(NF4(), some(), inputs=2), "NF4.block: 64 does not divide"),
    (lambda: quantize(Int8(), some(), inputs=0), "no 0 dims of layers, 0 of inputs"),
    (lambda: quantize(Int8(), some(), inputs=3, stacked=1), "no 1 dims of layers, 3"),
    (
      lambda: quantize(Int8(), jnp.ones((2, 2), int), inputs=1),
      "int32 of shape (2, 2)",
    ),
    (lambda: quantize(Int8(), jnp.ones((0, 2)), inputs=1), "shape (0, 2) is empty"),
    (
      lambda: quantize(Int4(block=3), some((2, 3)), inputs=1),
      "the 3 outputs of shape (2, 3) are odd",
    ),
    (lambda: bits_per_parameter(NF4(), (8, 8), inputs=1), "NF4.block: 64 does not"),
  ],
)
def test_a_wrong_weight_or_block_is_named(act, message):
  with pytest.raises(InputError, match=re.escape(message)):
    act()
