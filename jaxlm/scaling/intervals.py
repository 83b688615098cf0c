"""How sure a fit is: bootstraps, percentile intervals, predictions, backtests.

A bootstrap shows what another draw of the same runs would change. It knows nothing of a
wrong law, of other data, or of runs beyond the budgets tried: `backtest` asks that.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from jaxlm.errors import InputError
from jaxlm.scaling.fit import Fit, fit_surface, log_residuals, refit
from jaxlm.scaling.isoflop import fit_isoflop, valley
from jaxlm.scaling.surfaces import DISTINCT, Floats, Points, Surface, column, points

Drawn = TypeVar("Drawn")
TRIES = 100  # draws for one sample before the points are called too few


class Interval(NamedTuple):
  """The percentiles of a quantity over a bootstrap, and its standard deviation."""

  low: float
  high: float
  error: float


class Prediction(NamedTuple):
  """A loss with two intervals.

  `of_curve`: where the mean loss of such runs lies, by the spread of the coefficients.
  `of_run`: where one run's loss lies; the fit's own log residuals are added.
  """

  loss: float
  of_curve: Interval
  of_run: Interval


class Backtest(NamedTuple):
  """A fit without the largest budgets, and what it said of them.

  `errors` [m]: predicted over measured loss, less 1, of the points held out.
  `lower_errors` [n]: the same of the points that were fitted, to compare.
  """

  fit: Fit
  held: Points
  errors: Floats
  lower_errors: Floats


@threadpool_limits.wrap(limits=1)
def bootstrap(data: Points, fit: Fit, *, samples: int, seed: int) -> list[Surface]:
  """Returns a surface for each resample, with replacement, of the points.

  Each is refitted by the fit's own objective from its surface (trust regions, then
  L-BFGS), not by the search over starts: an optimum far away would be missed. A draw
  with fewer than 3 sizes or lengths, or one whose fit grows without end, is drawn
  again; this happens with few points only, and narrows the intervals.

  Raises:
    InputError: samples is under 2, or a hundred draws in a row fail.
  """
  rng = np.random.default_rng(seed)
  count = len(data.loss)

  def one() -> Surface | None:
    drawn = data.take(rng.integers(count, size=count))
    if min(len(np.unique(drawn.parameters)), len(np.unique(drawn.tokens))) < DISTINCT:
      return None
    try:
      return refit(drawn, fit)
    except InputError:
      return None

  return _repeated(one, samples)


def bootstrap_isoflop(
  budgets: Sequence[tuple[float, Points]], *, nearest: int, samples: int, seed: int
) -> Floats:
  """Returns the exponent a of N*(C) for each resample, [samples].

  Runs are resampled with replacement within each budget, so that every budget keeps its
  weight; `budgets` are FLOPs with their runs, `nearest` is `valley`'s. A draw whose
  valleys have too few sizes, or too few trusted minima, is drawn again.

  Raises:
    InputError: samples is under 2, or a hundred draws in a row fail.
  """
  rng = np.random.default_rng(seed)

  def one() -> float | None:
    valleys = []
    for flops, runs in budgets:
      drawn = runs.take(rng.integers(len(runs.loss), size=len(runs.loss)))
      if len(np.unique(drawn.parameters)) >= 3:
        valleys.append(valley(drawn, flops, nearest=nearest))
    try:
      return fit_isoflop(valleys).exponents[0]
    except InputError:
      return None

  return np.array(_repeated(one, samples))


def _repeated(one: Callable[[], Drawn | None], samples: int) -> list[Drawn]:
  if samples < 2:
    raise InputError(f"samples: {samples}; at least 2 are accepted.")
  found = []
  for _ in range(samples):
    for _ in range(TRIES):
      if (value := one()) is not None:
        found.append(value)
        break
    else:
      raise InputError(
        f"points: {TRIES} resamples in a row have no fit; more sizes, lengths or "
        "budgets are accepted."
      )
  return found


def coefficients(surfaces: Sequence[Surface]) -> Floats:
  """Returns E, A, B, alpha, beta of surfaces: [samples, 5]."""
  return np.array([(s.E, s.A, s.B, s.alpha, s.beta) for s in surfaces])


def interval(values: npt.ArrayLike, *, level: float = 0.95) -> Interval:
  """Returns the central interval of values [samples], by percentiles.

  Raises:
    InputError: fewer than 2 values, one is not finite, or level is not within 0 to 1.
  """
  array = np.asarray(values, np.float64)
  if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all():
    raise InputError(
      f"values: shape {array.shape}; two or more finite numbers are accepted."
    )
  if not 0 < level < 1:
    raise InputError(f"level: {level}; a number between 0 and 1 is accepted.")
  low, high = np.quantile(array, [(1 - level) / 2, (1 + level) / 2])
  return Interval(float(low), float(high), float(array.std(ddof=1)))


def predict(
  fit: Fit,
  surfaces: Sequence[Surface],
  parameters: float,
  tokens: float,
  *,
  level: float = 0.95,
) -> Prediction:
  """Returns the loss of a run with intervals over a bootstrap's surfaces.

  The residuals are added to each surface's loss by all pairs, without a draw.

  Raises:
    InputError: a number is not positive, or as of `interval`.
  """
  (n,), (d,) = column("parameters", [parameters]), column("tokens", [tokens])
  curve = np.array([float(surface.loss(n, d)) for surface in surfaces])
  # A residual is predicted less measured, so a run lies at exp(-residual).
  runs = (curve[:, None] * np.exp(-fit.residuals)[None]).ravel()
  return Prediction(
    loss=float(fit.surface.loss(n, d)),
    of_curve=interval(curve, level=level),
    of_run=interval(runs, level=level),
  )


def exponent(surfaces: Sequence[Surface], *, level: float = 0.95) -> Interval:
  """Returns the interval of a, N growing as C^a, over a bootstrap's surfaces.

  Raises:
    InputError: a surface has no frontier.
  """
  return interval([surface.exponents[0] for surface in surfaces], level=level)


def backtest(
  data: Points, flops: npt.ArrayLike, *, held: float = 0.999, delta: float = 1e-3
) -> Backtest:
  """Fits the points below the largest budget, and compares with those at it.

  Args:
    data: the points [n].
    flops: what each cost [n].
    held: held out are points with flops of at least this share of the largest; a budget
      that was met within 1% wants 0.99, and 0.5 holds out the last doubling.
    delta: `fit_surface`'s.

  Raises:
    InputError: held is out of range, a column's length differs, or too few points stay.
  """
  spent = column("flops", flops)
  if len(spent) != len(data.loss):
    raise InputError(f"flops: {len(spent)} values; {len(data.loss)} are accepted.")
  if not 0 < held <= 1:
    raise InputError(f"held: {held}; above 0 to 1 is accepted.")
  top = spent >= held * spent.max()
  low = data.take(~top)
  # Checked once more: fewer may remain than a surface needs.
  low = points(*low)
  fit = fit_surface(low, delta=delta)
  return Backtest(
    fit=fit,
    held=data.take(top),
    errors=np.expm1(log_residuals(fit.surface, data.take(top))),
    lower_errors=np.expm1(fit.residuals),
  )
