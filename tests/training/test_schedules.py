"""Schedules against their closed forms."""

import math

import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.training import schedules
from jaxlm.training.schedules import (
  Constant,
  InverseSqrt,
  WarmupCosine,
  WarmupLinear,
  WarmupStableDecay,
)

STEPS, WARMUP, PEAK = 100, 20, 3e-4


def cosine(progress, final):
  return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2


def after(step):
  return (step - WARMUP) / (STEPS - WARMUP)


def wsd(shape):
  """Decays over the last quarter, to a tenth."""
  left = {
    "linear": lambda p: 1 - p,
    "sqrt": lambda p: 1 - math.sqrt(p),
    "cosine": lambda p: cosine(p, 0),
  }[shape]
  return lambda step: 1.0 if step <= 75 else 0.1 + 0.9 * left((step - 75) / 25)


CASES = {
  "constant": (Constant, {}, lambda step: 1.0),
  "cosine": (WarmupCosine, {"final": 0.1}, lambda step: cosine(after(step), 0.1)),
  "linear": (WarmupLinear, {"final": 0.2}, lambda step: 1 - 0.8 * after(step)),
  "wsd linear": (WarmupStableDecay, {"decay": 0.25, "final": 0.1}, wsd("linear")),
  "wsd sqrt": (
    WarmupStableDecay,
    {"decay": 0.25, "final": 0.1, "shape": "sqrt"},
    wsd("sqrt"),
  ),
  "wsd cosine": (
    WarmupStableDecay,
    {"decay": 0.25, "final": 0.1, "shape": "cosine"},
    wsd("cosine"),
  ),
  "inverse sqrt": (InverseSqrt, {}, lambda step: math.sqrt(WARMUP / step)),
}


@pytest.mark.parametrize("name", CASES)
def test_values_at_the_start_in_warmup_and_after(name):
  kind, fields, form = CASES[name]
  rate = schedules.build(kind(peak=PEAK, warmup=WARMUP, **fields), STEPS)
  assert float(rate(0)) == 0
  assert float(rate(5)) == pytest.approx(PEAK / 4)
  for step in (20, 21, 60, 75, 76, 90, 99, 100):
    assert float(rate(step)) == pytest.approx(PEAK * form(step), rel=1e-5), step
  assert rate(np.int32(7)).dtype == np.float32


@pytest.mark.parametrize("name", CASES)
def test_without_warmup_the_first_step_has_the_peak(name):
  kind, fields, _ = CASES[name]
  rate = schedules.build(kind(peak=PEAK, warmup=0, **fields), STEPS)
  assert float(rate(0)) == pytest.approx(PEAK)


def test_the_end_holds_past_the_run():
  rate = schedules.build(WarmupCosine(peak=1.0, final=0.1), 10)
  assert float(rate(10)) == float(rate(999)) == pytest.approx(0.1)


def test_a_decay_longer_than_what_warmup_leaves():
  rate = schedules.build(WarmupStableDecay(peak=1.0, warmup=5, decay=0.9), 10)
  values = [float(rate(step)) for step in (5, 6, 10)]
  np.testing.assert_allclose(values, [1.0, 0.8, 0.0], atol=1e-6)


def test_warmup_as_long_as_the_run_is_allowed():
  rate = schedules.build(WarmupCosine(peak=1.0, warmup=10), 10)
  assert float(rate(10)) == pytest.approx(1.0)


@pytest.mark.parametrize("warmup", [101, -1])
def test_warmup_outside_the_run(warmup):
  with pytest.raises(InputError, match=rf"optimizer.lr.warmup: {warmup} .* 100 steps"):
    schedules.build(Constant(peak=1.0, warmup=warmup), STEPS)


@pytest.mark.parametrize(
  ("field", "value"), [("decay", 1.5), ("decay", -0.1), ("final", 2.0)]
)
def test_shares_are_shares(field, value):
  spec = WarmupStableDecay(peak=1.0, **{field: value})
  with pytest.raises(InputError, match=rf"lr.{field}: {value} is not a share"):
    schedules.build(spec, STEPS)
