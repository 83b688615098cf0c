"""Intervals hold what was planted, and widen where they should."""

import csv
import pathlib

import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.scaling import intervals
from jaxlm.scaling.fit import fit_surface, refit
from jaxlm.scaling.surfaces import Surface, points

TRUE = Surface(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37)
REAL = pathlib.Path(__file__).parents[1] / "goldens/scaling/kyotakano.csv"
NOISE = 0.004


def runs(budgets, seed=0, noise=NOISE):
  flops = np.repeat(budgets, 9)
  size = TRUE.frontier(flops)[0] * np.tile(np.geomspace(1 / 6, 6, 9), len(budgets))
  tokens = flops / (6 * size)
  factor = np.exp(noise * np.random.default_rng(seed).standard_normal(len(size)))
  return points(size, tokens, TRUE.loss(size, tokens) * factor), flops


@pytest.fixture(scope="module")
def fitted():
  data, _ = runs(np.geomspace(1e18, 1e21, 7))
  fit = fit_surface(data, starts=8)
  return data, fit, intervals.bootstrap(data, fit, samples=80, seed=1)


def test_the_planted_coefficients_lie_in_the_intervals(fitted):
  _, _, surfaces = fitted
  table = intervals.coefficients(surfaces)
  assert table.shape == (80, 5)
  planted = (TRUE.E, TRUE.A, TRUE.B, TRUE.alpha, TRUE.beta)
  for values, true in zip(table.T, planted, strict=True):
    found = intervals.interval(values, level=0.98)
    assert found.low < true < found.high
    assert found.error > 0
  a = intervals.exponent(surfaces)
  assert a.low < TRUE.exponents[0] < a.high
  assert a.high - a.low < 0.2


def test_a_resample_is_fitted_as_from_all_starts(fitted):
  data, fit, _ = fitted
  drawn = data.take(np.random.default_rng(3).integers(63, size=63))
  near, far = refit(drawn, fit), fit_surface(drawn, starts=24).surface
  assert near.alpha == pytest.approx(far.alpha, rel=1e-3)
  assert near.beta == pytest.approx(far.beta, rel=1e-3)


def test_a_seed_fixes_the_bootstrap(fitted):
  data, fit, _ = fitted
  one, same, other = (
    intervals.coefficients(intervals.bootstrap(data, fit, samples=3, seed=seed))
    for seed in (5, 5, 6)
  )
  np.testing.assert_array_equal(one, same)
  assert (one != other).all()


def test_predictions_widen_away_from_the_points_and_for_a_single_run(fitted):
  _, fit, surfaces = fitted
  here, far = (
    intervals.predict(fit, surfaces, *map(float, TRUE.frontier(c)))
    for c in (3e19, 1e24)
  )
  true = float(TRUE.loss(*TRUE.frontier(1e24)))
  assert far.of_curve.low < true < far.of_curve.high
  assert far.of_curve.error > 3 * here.of_curve.error
  assert here.of_curve.low <= here.loss <= here.of_curve.high
  assert here.of_run.error > 2 * here.of_curve.error
  assert here.of_run.error == pytest.approx(NOISE * here.loss, rel=0.35)


def test_isoflop_s_exponent_has_an_interval():
  budgets = [(c, runs([c], seed=i)[0]) for i, c in enumerate((1e18, 1e19, 1e20, 1e21))]
  values = intervals.bootstrap_isoflop(budgets, nearest=9, samples=60, seed=0)
  assert values.shape == (60,)
  found = intervals.interval(values)
  assert found.low < TRUE.exponents[0] < found.high
  assert found.high - found.low < 0.3


def test_the_largest_budget_is_foretold():
  data, flops = runs(np.geomspace(1e18, 1e21, 7))
  result = intervals.backtest(data, flops)
  assert len(result.held.loss) == 9
  assert result.held.tokens.max() * result.held.parameters.min() * 6 <= 1.001e21
  assert len(result.lower_errors) == 54
  assert np.abs(result.errors).max() < 5 * NOISE
  # The sign: a fit that says too much is above 0.
  n, d = result.held.parameters, result.held.tokens
  np.testing.assert_allclose(
    result.errors, result.fit.surface.loss(n, d) / result.held.loss - 1, atol=1e-12
  )


def test_published_runs_are_foretold():
  with REAL.open() as file:
    rows = list(csv.DictReader(file))
  c, n, d, loss = (
    np.array([float(r[key]) for r in rows]) for key in ("C", "N", "D", "loss")
  )
  result = intervals.backtest(points(n, d, loss), c, held=0.1)
  assert 5 < len(result.held.loss) < 60
  assert np.sqrt(np.mean(result.errors**2)) < 0.02


def test_interval_is_of_percentiles():
  found = intervals.interval(np.arange(101), level=0.9)
  assert (found.low, found.high) == pytest.approx((5, 95))
  assert found.error == pytest.approx(np.std(np.arange(101), ddof=1))


def test_what_cannot_be_is_refused(fitted):
  data, fit, surfaces = fitted
  with pytest.raises(InputError, match="samples: 1; at least 2"):
    intervals.bootstrap(data, fit, samples=1, seed=0)
  with pytest.raises(InputError, match="level: 95; a number between 0 and 1"):
    intervals.exponent(surfaces, level=95)
  with pytest.raises(InputError, match="two or more finite"):
    intervals.interval([1.0, np.nan])
  with pytest.raises(InputError, match=r"tokens\[0\]: 0.0"):
    intervals.predict(fit, surfaces, 1e9, 0.0)
  with pytest.raises(InputError, match="flops: 2 values; 63"):
    intervals.backtest(data, [1, 2])
  with pytest.raises(InputError, match="held: 2; above 0 to 1"):
    intervals.backtest(data, data.tokens, held=2)
  with pytest.raises(InputError, match="points: 0 of them"):
    intervals.backtest(data, np.full(63, 1e18))
  flat = data.take(np.arange(9))
  with pytest.raises(InputError, match="100 resamples in a row"):
    intervals.bootstrap_isoflop([(1e18, flat)], nearest=5, samples=2, seed=0)
