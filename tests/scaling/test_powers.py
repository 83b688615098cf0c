"""Power laws and optima are exact on exact data, and say when they are none."""

import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.scaling.powers import fit_power, optimum

N, D = (grid.ravel() for grid in np.meshgrid([1e6, 1e7, 3e8], [1e8, 1e9, 1e10]))


def test_a_law_of_two_regressors_comes_back():
  law = fit_power(1.79 * N**-0.713 * D**0.307, parameters=N, tokens=D)
  assert law.scale == pytest.approx(1.79, rel=1e-9)
  assert law.exponents == pytest.approx({"parameters": -0.713, "tokens": 0.307})
  assert law.rms < 1e-12
  assert law.predict(tokens=2e11, parameters=7e9) == pytest.approx(
    1.79 * 7e9**-0.713 * 2e11**0.307
  )


def test_the_residual_is_the_noise():
  noise = 0.1 * np.random.default_rng(0).standard_normal(9)
  law = fit_power(3 * D**0.5 * np.exp(noise), tokens=D)
  assert 0.03 < law.rms < 0.1 * 1.5
  # Least squares of logs: residuals are orthogonal to the regressor.
  log = np.log(law.predict(tokens=D)) - np.log(3 * D**0.5 * np.exp(noise))
  assert log @ (np.log(D) - np.log(D).mean()) == pytest.approx(0, abs=1e-9)


def test_columns_that_fix_no_exponent_are_refused():
  with pytest.raises(InputError, match="do not vary enough"):
    fit_power(N, parameters=N, square=N**2)
  with pytest.raises(InputError, match="do not vary enough"):
    fit_power(N, tokens=np.full(9, 3.0))
  with pytest.raises(InputError, match=r"2 rows .* at least 3"):
    fit_power([1, 2], a=[1, 2], b=[1, 3])
  with pytest.raises(InputError, match="tokens: 2 values; 9"):
    fit_power(N, tokens=[1, 2])
  with pytest.raises(InputError, match=r"y\[0\]: -1.0"):
    fit_power([-1, 2, 3], a=[1, 2, 3])
  with pytest.raises(InputError, match="no regressors"):
    fit_power(N)
  with pytest.raises(InputError, match=r"\['size'\] are given; \['tokens'\]"):
    fit_power(D, tokens=D).predict(size=1.0)


RATES = np.array([1e-3, 1e-4, 3e-3, 3e-4, 1e-2, 3e-5])


def bowl(best: float, rates=RATES):
  return 2.5 + 0.04 * np.log(rates / best) ** 2


def test_a_parabola_s_minimum_is_found_in_any_order():
  for nearest in (3, 5, 50):
    found = optimum(RATES, bowl(7e-4), nearest=nearest)
    assert found.trusted
    assert found.x == pytest.approx(7e-4)
    assert found.loss == pytest.approx(2.5)
    assert found.curvature == pytest.approx(0.04)


def test_points_far_from_the_best_do_not_count():
  loss = bowl(7e-4) + np.where(RATES == 1e-2, 3.0, 0)  # diverged
  assert optimum(RATES, loss, nearest=3).x == pytest.approx(7e-4)
  assert optimum(RATES, loss, nearest=6).x != pytest.approx(7e-4, rel=0.05)


def test_a_minimum_at_the_edge_is_told():
  found = optimum(RATES, bowl(1e-6))
  assert found.at_edge
  assert not found.trusted
  assert found.x == pytest.approx(3e-5)
  assert found.loss == pytest.approx(bowl(1e-6).min())


def test_points_that_bend_the_wrong_way_are_told():
  found = optimum([1, 2, 4, 8, 16], [3, 2.95, 2.9, 3.2, 2.0], nearest=5)
  assert not found.convex
  assert not found.trusted
  assert found.x == pytest.approx(16)


def test_repeats_of_a_setting_count_together():
  rates = np.repeat(RATES, 3)
  noise = np.tile([-0.01, 0, 0.01], 6)
  assert optimum(rates, bowl(7e-4, rates) + noise).x == pytest.approx(7e-4)


def test_too_few_settings_are_refused():
  with pytest.raises(InputError, match="x: 2 distinct values; at least 3"):
    optimum([1, 2, 2], [1, 2, 3])
  with pytest.raises(InputError, match="loss: 2 values; 3"):
    optimum([1, 2, 3], [1, 2])
  with pytest.raises(InputError, match="nearest: 2"):
    optimum([1, 2, 3], [1, 2, 3], nearest=2)


def test_no_rows_are_refused():
  with pytest.raises(InputError, match="y: no rows; at least 2 are accepted"):
    fit_power([], flops=[])
