"""Surfaces come back from points that they made, whatever the units and the starts."""

import csv
import pathlib

import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.scaling import fit, surfaces
from jaxlm.scaling.surfaces import Points, Surface, points

TRUE = Surface(E=1.8, A=480.0, B=2100.0, alpha=0.35, beta=0.37)
COEFFICIENTS = ("E", "A", "B", "alpha", "beta")
REAL = pathlib.Path(__file__).parents[1] / "goldens/scaling/kyotakano.csv"


def grid(noise: float = 0.0, seed: int = 0, surface=TRUE) -> Points:
  """Seven budgets, at each nine sizes around the best."""
  flops = np.repeat(np.geomspace(1e18, 1e21, 7), 9)
  size = surface.frontier(flops)[0] * np.tile(np.geomspace(1 / 6, 6, 9), 7)
  tokens = flops / (6 * size)
  factor = np.exp(noise * np.random.default_rng(seed).standard_normal(len(size)))
  return points(size, tokens, surface.loss(size, tokens) * factor)


def values(surface: Surface) -> list[float]:
  return [getattr(surface, name) for name in COEFFICIENTS]


def test_exact_points_give_their_coefficients():
  found = fit.fit_surface(grid())
  np.testing.assert_allclose(values(found.surface), values(TRUE), rtol=1e-4)
  assert found.objective < 1e-12
  assert found.agreeing > 0.2
  assert found.r2 > 1 - 1e-9


def test_a_far_surface_is_found_too():
  true = Surface(E=0.7, A=60.0, B=9.0, alpha=0.6, beta=0.2)
  data = grid(surface=true)
  np.testing.assert_allclose(
    values(fit.fit_surface(data, starts=8).surface), values(true), rtol=1e-4
  )
  np.testing.assert_allclose(values(fit.fit_projected(data)), values(true), rtol=1e-4)


def test_the_projected_fit_agrees_on_exact_points():
  np.testing.assert_allclose(values(fit.fit_projected(grid())), values(TRUE), rtol=1e-4)


def test_noisy_points_give_the_exponents():
  found = fit.fit_surface(grid(noise=0.003)).surface
  assert found.alpha == pytest.approx(TRUE.alpha, abs=0.03)
  assert found.beta == pytest.approx(TRUE.beta, abs=0.03)
  assert abs(found.E - TRUE.E) < 0.05


def test_one_outlier_moves_the_robust_fit_less():
  data = grid(noise=0.002)
  wrong = data._replace(loss=data.loss * np.where(np.arange(63) == 4, 1.2, 1))

  def moved(make):
    before, after = make(data), make(wrong)
    return abs(after.exponents[0] - before.exponents[0])

  robust = moved(lambda data: fit.fit_surface(data, starts=8).surface)
  assert robust < 0.005
  assert moved(fit.fit_projected) > 3 * robust


def test_each_point_ten_times_is_the_same_fit():
  """The number of points scales the sum, and a search that stops early shows it."""
  data = grid(noise=0.003)
  once, often = (
    fit.fit_surface(data.take(np.tile(np.arange(63), n)), starts=8) for n in (1, 10)
  )
  np.testing.assert_allclose(values(often.surface), values(once.surface), rtol=1e-4)
  assert often.objective == pytest.approx(10 * once.objective, rel=1e-9)


def test_each_optimizer_alone_ends_at_the_optimum():
  """With a mean and the default tolerances L-BFGS stops early: a "success"."""
  data = grid(noise=0.003)
  best = fit.fit_surface(data, starts=8)
  design = fit._Design.of(data)
  start = design.centred(np.array([0.5, 5.0, 5.0, 0.5, 0.5]))
  end = fit._descend(start, design, 1e-3)
  assert fit._objective(end, design, 1e-3) == pytest.approx(best.objective, rel=1e-3)
  near = design.centred(fit._coefficients(TRUE))
  end = fit.least_huber(design.residuals, design.jacobian, near, 1e-3)
  assert fit._objective(end, design, 1e-3) == pytest.approx(best.objective, rel=1e-3)


def test_units_of_size_and_length_change_the_coefficients_alone():
  data = grid(noise=0.003)
  here = fit.fit_surface(data, starts=8).surface
  there = fit.fit_surface(
    points(data.parameters / 1e6, data.tokens / 1e9, data.loss), starts=8
  ).surface
  assert there.alpha == pytest.approx(here.alpha, rel=1e-4)
  assert there.A * 1e6**here.alpha == pytest.approx(here.A, rel=1e-4)
  assert there.B * 1e9**here.beta == pytest.approx(here.B, rel=1e-4)


def test_the_objective_is_the_sum_of_huber_losses_of_log_losses():
  data = grid(noise=0.003)
  found = fit.fit_surface(data, delta=2e-3)
  residuals = fit.log_residuals(found.surface, data)
  np.testing.assert_allclose(found.residuals, residuals, atol=1e-12)
  by_hand = sum(
    r * r / 2 if abs(r) <= 2e-3 else 2e-3 * (abs(r) - 1e-3) for r in residuals
  )
  assert found.objective == pytest.approx(by_hand, rel=1e-9)


def test_the_gradients_are_those_of_the_residuals():
  design = fit._Design.of(grid(noise=0.003))
  theta = np.array([0.4, -0.5, -0.7, 0.3, 0.5])
  step = 1e-6 * np.eye(5)
  numeric = [
    (design.residuals(theta + s) - design.residuals(theta - s)) / 2e-6 for s in step
  ]
  np.testing.assert_allclose(design.jacobian(theta), np.stack(numeric, 1), atol=1e-8)


@pytest.mark.parametrize("flops", [1e18, 3e23])
def test_no_neighbour_on_the_budget_is_better_than_the_frontier(flops):
  size, tokens = TRUE.frontier(flops, per=7.0)
  assert 7 * size * tokens == pytest.approx(flops)
  least = TRUE.loss(size, tokens)
  for factor in (0.98, 1.02):
    assert TRUE.loss(size * factor, tokens / factor) > least
  # At the minimum both terms' slopes in log size are the same.
  assert TRUE.alpha * TRUE.A * size**-TRUE.alpha == pytest.approx(
    TRUE.beta * TRUE.B * tokens**-TRUE.beta
  )


def test_the_frontier_grows_by_its_exponents():
  (n1, d1), (n2, d2) = TRUE.frontier(1e20), TRUE.frontier(1e22)
  grown = np.log([n2 / n1, d2 / d1]) / np.log(100)
  np.testing.assert_allclose(grown, TRUE.exponents, rtol=1e-9)
  assert sum(TRUE.exponents) == pytest.approx(1)
  np.testing.assert_allclose(
    TRUE.tokens_per_parameter([1e20, 1e22]), [d1 / n1, d2 / n2]
  )


def test_kaplan_s_law_comes_back():
  true = surfaces.Kaplan(N_c=8.8e13, D_c=5.4e13, alpha_N=0.076, alpha_D=0.095)
  n, d = (grid.ravel() for grid in np.meshgrid(*[np.geomspace(1e6, 1e10, 7)] * 2))
  found = fit.fit_kaplan(points(n, d, true.loss(n, d)))
  for name in ("N_c", "D_c", "alpha_N", "alpha_D"):
    assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-4)


def real() -> tuple[Points, np.ndarray]:
  with REAL.open() as file:
    rows = list(csv.DictReader(file))
  c, n, d, loss = (
    np.array([float(r[key]) for r in rows]) for key in ("C", "N", "D", "loss")
  )
  return points(n, d, loss), c


def test_published_runs_have_one_optimum_from_many_starts():
  data, _ = real()
  few, many = fit.fit_surface(data, starts=8), fit.fit_surface(data, starts=96)
  np.testing.assert_allclose(values(many.surface), values(few.surface), rtol=1e-3)
  assert many.agreeing > 0.2
  assert many.r2 > 0.98
  assert 0.35 < many.surface.exponents[0] < 0.65


ROWS = {"parameters": [1, 2, 3, 4, 5, 6], "tokens": [1, 2, 3, 1, 2, 3], "loss": [3] * 6}


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"loss": [3] * 5}, "differ in length"),
    ({"loss": [3] * 5 + [np.nan]}, r"loss\[5\]: nan; finite positive"),
    ({"tokens": [1, 0, 3, 1, 2, 3]}, r"tokens\[1\]: 0.0; finite positive"),
    ({"parameters": [1, 2] * 3}, "parameters: 2 distinct values; at least 3"),
    ({"loss": [[3] * 6]}, r"loss: shape \(1, 6\)"),
    ({"loss": ["low"] * 6}, "loss: .*numbers are accepted"),
    ({name: [1, 2, 3] for name in ROWS}, "points: 3 of them; at least 6"),
  ],
)
def test_points_that_are_none_are_refused(wrong, message):
  with pytest.raises(InputError, match=message):
    points(**(ROWS | wrong))


def test_settings_out_of_range_are_refused():
  with pytest.raises(InputError, match="delta: 0; a positive"):
    fit.fit_surface(grid(), delta=0)
  with pytest.raises(InputError, match="starts: 0; 1 to 4500"):
    fit.fit_surface(grid(), starts=0)
  with pytest.raises(InputError, match=r"B: 0\.0; a frontier needs"):
    _ = Surface(E=1.0, A=1.0, B=0.0, alpha=0.3, beta=0.3).exponents
  with pytest.raises(InputError, match="A: its logarithm ran to 800"):
    surfaces.exponential("A", 800.0)
