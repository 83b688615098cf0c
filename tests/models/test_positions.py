"""Rotary frequencies against formulas written anew, one pair of dims at a time."""

import math

import numpy as np
import pytest

from jaxlm.models.positions import rope_frequencies
from jaxlm.models.spec import (
  LinearScaling,
  Llama3Scaling,
  LongScaling,
  NTKScaling,
  RoPE,
  YaRNScaling,
)

DIM, BASE = 64, 500_000.0


def plain(i, dims=DIM, base=BASE):
  return 1.0 / base ** (2 * i / dims)


def check(rope, formula, pairs=DIM // 2, magnitude=1.0):
  found, factor = rope_frequencies(rope, DIM)
  assert found.shape == (pairs,)
  np.testing.assert_allclose(found, [formula(i) for i in range(pairs)], rtol=1e-12)
  assert factor == pytest.approx(magnitude)


def test_plain_and_partial():
  check(RoPE(base=BASE), plain)
  check(RoPE(base=BASE, fraction=0.5), lambda i: plain(i, 32), 16)
  check(RoPE(base=BASE, fraction=0.25), lambda i: plain(i, 16), 8)


def test_linear():
  rope = RoPE(base=BASE, scaling=LinearScaling(factor=4.0))
  check(rope, lambda i: plain(i) / 4)


def test_ntk_keeps_the_fastest_pair_and_divides_the_slowest_by_the_factor():
  rope = RoPE(base=BASE, scaling=NTKScaling(factor=4.0))
  check(rope, lambda i: plain(i, base=BASE * 4.0 ** (DIM / (DIM - 2))))
  found, _ = rope_frequencies(rope, DIM)
  assert found[0] == 1.0
  assert found[-1] == pytest.approx(plain(DIM // 2 - 1) / 4)


def test_llama3():
  """Wavelength against the two bands, as the reference code has it."""

  def formula(i):
    wavelength = 2 * math.pi / plain(i)
    if wavelength < 8192 / 4.0:
      return plain(i)
    if wavelength > 8192 / 1.0:
      return plain(i) / 32.0
    smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
    return (1 - smooth) * plain(i) / 32.0 + smooth * plain(i)

  check(RoPE(base=BASE, scaling=Llama3Scaling(factor=32.0)), formula)
  kinds = {formula(i) / plain(i) for i in range(DIM // 2)}
  assert {1.0, 1 / 32} < kinds
  assert any(1 / 32 < kind < 1 for kind in kinds)


def test_yarn():
  """The paper's equations 17 to 25, with its rounded ends of the ramp."""
  length, factor, fast, slow = 4096, 16.0, 32.0, 1.0

  def dim_that_turns(times):
    return DIM * math.log(length / (2 * math.pi * times)) / (2 * math.log(BASE))

  low, high = math.floor(dim_that_turns(fast)), math.ceil(dim_that_turns(slow))
  assert 0 < low < high < DIM // 2

  def formula(i):
    ramp = min(max((i - low) / (high - low), 0.0), 1.0)
    return plain(i) * (1 - ramp) + plain(i) / factor * ramp

  scaling = YaRNScaling(factor=factor, original_length=length)
  check(RoPE(base=BASE, scaling=scaling), formula, magnitude=0.1 * math.log(16) + 1)
  scaling = YaRNScaling(factor=factor, original_length=length, magnitude=1.0)
  check(RoPE(base=BASE, scaling=scaling), formula, magnitude=1.0)


@pytest.mark.parametrize(("length", "used"), [(16, "short"), (17, "long")])
def test_long_scaling_goes_by_the_context_and_not_by_the_input(length, used):
  """LongRoPE: each frequency over its own factor."""
  lists = {
    "short": tuple(1.0 + 0.1 * i for i in range(DIM // 2)),
    "long": tuple(2.0 + 0.3 * i for i in range(DIM // 2)),
  }
  scaling = LongScaling(**lists, original_length=16, length=length, magnitude=1.25)
  rope = RoPE(base=BASE, scaling=scaling)
  check(rope, lambda i: plain(i) / lists[used][i], magnitude=1.25)
