"""Loss as a function of parameters and tokens, fitted.

Three fits of the same points. `fit_surface` is approach 3 of Hoffmann et al. 2022 (a
robust fit of log losses), `fit_projected` a least-squares fit of the same surface that
searches in two dimensions only, `fit_kaplan` the earlier law of Kaplan et al. 2020.
NumPy float64 and SciPy; nothing here traces.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize, special
from threadpoolctl import threadpool_limits

from jaxlm.errors import InputError
from jaxlm.scaling.surfaces import (
  Floats,
  Kaplan,
  Points,
  Predictor,
  Surface,
  exponential,
)

# Of Hoffmann et al. 2022, appendix D.3: (e, a, b, alpha, beta) of 4,500 starts.
GRID: Floats = np.array(
  list(
    itertools.product(
      np.arange(-1, 1.1, 0.5),
      np.arange(0, 26, 5.0),
      np.arange(0, 26, 5.0),
      np.arange(0, 2.1, 0.5),
      np.arange(0, 2.1, 0.5),
    )
  )
)


class Fit(NamedTuple):
  """What `fit_surface` found.

  `objective`: the sum of Huber losses. `residuals` [n]: log predicted less log measured
  loss. `agreeing`: the share of the starts that ended within 1% of the best objective;
  near 0, ask for more starts. `rms` and `r2` are of log losses.
  """

  surface: Surface
  delta: float
  objective: float
  residuals: Floats
  agreeing: float
  rms: float
  r2: float


def log_residuals(surface: Predictor, data: Points) -> Floats:
  """Returns log predicted less log measured loss [n]."""
  return np.log(surface.loss(data.parameters, data.tokens)) - np.log(data.loss)


def huber(residuals: Floats, delta: float) -> Floats:
  """Returns r^2 / 2 within delta and delta (|r| - delta / 2) outside, elementwise."""
  size = np.abs(residuals)
  return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))


# L-BFGS-B's matrices have five rows: threads for them cost twenty times the work.
@threadpool_limits.wrap(limits=1)
def fit_surface(data: Points, *, delta: float = 1e-3, starts: int = 48) -> Fit:
  """Returns the surface with the least SUM of Huber losses of log-loss residuals.

  Approach 3 of Hoffmann et al. 2022, with what Besiroglu et al. 2024 mended: a mean
  makes the objective so small that an optimizer stops at once and says "success".

  It is not the paper's search, though the same objective. All 4,500 points of their
  grid are evaluated; L-BFGS runs from the best `starts` of them (4,500: all) and from
  `fit_projected`'s surface; a trust-region least-squares fit polishes the best. ln N
  and ln D are centred meanwhile, which changes the coordinates alone.

  Raises:
    InputError: delta or starts is out of range, or the points let a coefficient grow
      without end.
  """
  if not 0 < delta < np.inf:
    raise InputError(f"delta: {delta}; a positive number is accepted.")
  if not 1 <= starts <= len(GRID):
    raise InputError(f"starts: {starts}; 1 to {len(GRID)} are accepted.")
  design = _Design.of(data)
  grid = design.centred(GRID)
  order = np.argsort(
    [_objective(theta, design, delta) for theta in grid], kind="stable"
  )
  first = design.centred(_coefficients(fit_projected(data)))
  ends = [_descend(theta, design, delta) for theta in (first, *grid[order[:starts]])]
  values = np.array([_objective(theta, design, delta) for theta in ends])
  best = _polished(ends[int(np.argmin(values))], design, delta, rounds=8)
  objective = _objective(best, design, delta)
  residuals = design.residuals(best)
  spread = np.log(data.loss) - np.log(data.loss).mean()
  return Fit(
    surface=design.surface(best),
    delta=delta,
    objective=objective,
    residuals=residuals,
    # Of an exact fit's objectives, all 0 but for rounding, none is 1% of another.
    agreeing=float(
      np.mean(values <= 1.01 * objective + 1e-12 * len(residuals) * delta)
    ),
    rms=float(np.sqrt(np.mean(residuals**2))),
    r2=float(1 - (residuals @ residuals) / (spread @ spread)) if spread.any() else 0.0,
  )


def refit(data: Points, fit: Fit) -> Surface:
  """Returns the surface of other points, from a fit's own surface as the one start.

  For resampled points, whose optimum is near; it raises as `fit_surface` does.
  """
  design = _Design.of(data)
  start = design.centred(_coefficients(fit.surface))
  return design.surface(_polished(start, design, fit.delta, rounds=1))


class _Design(NamedTuple):
  """Points in the fit's coordinates: ln N and ln D centred.

  Uncentred, a and alpha are nearly one direction (ln N is about 20 everywhere), and the
  Hessian's condition number is about 1e11.
  """

  x: Floats
  y: Floats
  target: Floats
  middle: tuple[float, float]

  @classmethod
  def of(cls, data: Points) -> "_Design":
    x, y = np.log(data.parameters), np.log(data.tokens)
    middle = float(x.mean()), float(y.mean())
    return cls(x - middle[0], y - middle[1], np.log(data.loss), middle)

  def centred(self, theta: Floats) -> Floats:
    """[..., 5] of (e, a, b, alpha, beta); `surface` goes the other way."""
    e, a, b, alpha, beta = np.moveaxis(theta, -1, 0)
    return np.stack(
      [e, a - alpha * self.middle[0], b - beta * self.middle[1], alpha, beta], -1
    )

  def terms(self, theta: Floats) -> Floats:
    """Logarithms of the three terms, [3, n]."""
    e, a, b, alpha, beta = theta
    return np.stack([np.full_like(self.x, e), a - alpha * self.x, b - beta * self.y])

  def residuals(self, theta: Floats) -> Floats:
    """Log predicted less log measured loss, [n]."""
    terms = self.terms(theta)
    top = terms.max(0)
    return top + np.log(np.exp(terms - top).sum(0)) - self.target

  def jacobian(self, theta: Floats) -> Floats:
    """Derivatives of the residuals, [n, 5]."""
    of_e, of_n, of_d = special.softmax(self.terms(theta), axis=0)
    return np.stack([of_e, of_n, of_d, -of_n * self.x, -of_d * self.y], 1)

  def surface(self, theta: Floats) -> Surface:
    e, a, b, alpha, beta = (float(value) for value in theta)
    logs = {"E": e, "A": a + alpha * self.middle[0], "B": b + beta * self.middle[1]}
    return Surface(
      **{name: exponential(name, value) for name, value in logs.items()},
      alpha=alpha,
      beta=beta,
    )


def _coefficients(surface: Surface) -> Floats:
  """(e, a, b, alpha, beta); a term that is absent is made negligible."""
  logs = [np.log(max(value, 1e-30)) for value in (surface.E, surface.A, surface.B)]
  return np.array([*logs, surface.alpha, surface.beta])


def _objective(theta: Floats, design: _Design, delta: float) -> float:
  return float(huber(design.residuals(theta), delta).sum())


def _descend(theta: Floats, design: _Design, delta: float) -> Floats:
  def scaled(theta: Floats) -> tuple[float, Floats]:
    # The sum over delta (1e3 of the sum at 1e-3): L-BFGS stops by absolute changes
    # where its objective is under 1.
    residuals = design.residuals(theta)
    slope = np.clip(residuals / delta, -1, 1) @ design.jacobian(theta)
    return float(huber(residuals, delta).sum() / delta), slope

  options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 2000, "maxfun": 4000}
  return optimize.minimize(
    scaled, theta, jac=True, method="L-BFGS-B", options=options
  ).x


def _polished(theta: Floats, design: _Design, delta: float, *, rounds: int) -> Floats:
  """Trust-region and L-BFGS steps in turn, until neither gains."""
  best = _objective(theta, design, delta)
  for _ in range(rounds):
    found = least_huber(design.residuals, design.jacobian, theta, delta)
    found = min(
      (found, _descend(found, design, delta)),
      key=lambda end: _objective(end, design, delta),
    )
    value, before = _objective(found, design, delta), best
    if value < best:
      theta, best = found, value
    if not value < before * (1 - 1e-10):
      break
  return theta


def least_huber(
  residuals: Callable[[Floats], Floats],
  jacobian: Callable[[Floats], Floats],
  start: Floats,
  delta: float,
  *,
  bounds: tuple[npt.ArrayLike, npt.ArrayLike] = (-np.inf, np.inf),
) -> Floats:
  """Returns where the sum of Huber losses is least near a start, by trust regions."""
  # Where a coefficient runs off, SciPy's own steps overflow and are then refused.
  with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
    return optimize.least_squares(
      residuals,
      start,
      jac=jacobian,  # pyright: ignore[reportArgumentType]  # the stub wants a string
      loss="huber",
      f_scale=delta,
      bounds=bounds,
      x_scale="jac",
      ftol=1e-14,
      xtol=1e-14,
      gtol=1e-14,
      max_nfev=100,
    ).x


def fit_projected(data: Points) -> Surface:
  """Returns the surface with the least sum of squared residuals of losses.

  Variable projection: at a given alpha and beta the other three are a non-negative
  least-squares problem with one answer, so the search has two dimensions. It needs no
  starts; outliers weigh more than in `fit_surface`. A, B or E may come out as 0.

  Raises:
    InputError: a coefficient grows without end.
  """
  design = _Design.of(data)

  def solved(exponents: npt.ArrayLike) -> tuple[Floats, float]:
    # Inside 0 to 3, where the search may step out of them: at 0 two columns are one.
    alpha, beta = np.clip(exponents, 1e-3, 3)
    columns = np.stack(
      [np.ones_like(design.x), np.exp(-alpha * design.x), np.exp(-beta * design.y)], 1
    )
    size = np.linalg.norm(columns, axis=0)
    found, norm = optimize.nnls(columns / size, data.loss)
    return np.array([*found / size, alpha, beta]), float(norm)

  steps = np.geomspace(0.02, 2, 16)
  start = min(itertools.product(steps, steps), key=lambda pair: solved(pair)[1])
  end = optimize.minimize(
    lambda pair: solved(pair)[1],
    start,
    method="Nelder-Mead",
    options={"xatol": 1e-10, "fatol": 1e-13, "maxiter": 2000, "maxfev": 2000},
  ).x
  e, a, b, alpha, beta = (float(value) for value in solved(end)[0])
  logs = np.log(np.maximum([e, a, b], 1e-300))
  surface = design.surface(np.array([*logs, alpha, beta]))
  present = {"E": e > 0, "A": a > 0, "B": b > 0}
  return dataclasses.replace(
    surface, **{name: 0.0 for name, there in present.items() if not there}
  )


def fit_kaplan(data: Points, *, delta: float = 1e-3) -> Kaplan:
  """Returns Kaplan et al.'s law by `fit_surface`'s objective, the best of 27 starts.

  Raises:
    InputError: a coefficient grows without end.
  """
  design = _Design.of(data)

  # theta: ln alpha_D, ln (alpha_N / alpha_D), and both terms' logs at the centre.
  def terms(theta: Floats) -> Floats:
    return np.stack([theta[2] - np.exp(theta[1]) * design.x, theta[3] - design.y])

  def residuals(theta: Floats) -> Floats:
    return np.exp(theta[0]) * np.logaddexp(*terms(theta)) - design.target

  def jacobian(theta: Floats) -> Floats:
    of_n, of_d = np.exp(theta[0]) * special.softmax(terms(theta), axis=0)
    whole = residuals(theta) + design.target
    return np.stack([whole, -of_n * design.x * np.exp(theta[1]), of_n, of_d], 1)

  # An exponent of e^5 is none; an unbounded step would overflow.
  limits = np.array([5, 5, np.inf, np.inf])
  ends = []
  for exponent, ratio, tilt in itertools.product(
    (0.05, 0.1, 0.3), (0.5, 1, 2), (-2, 0, 2)
  ):
    level = design.target.mean() / exponent - np.log(2 * np.cosh(tilt))
    start = np.array([np.log(exponent), np.log(ratio), level + tilt, level - tilt])
    ends.append(
      least_huber(residuals, jacobian, start, delta, bounds=(-limits, limits))
    )
  best = min(ends, key=lambda end: float(huber(residuals(end), delta).sum()))
  alpha_d, ratio = float(np.exp(best[0])), float(np.exp(best[1]))
  return Kaplan(
    N_c=exponential("N_c", best[2] / ratio + design.middle[0]),
    D_c=exponential("D_c", best[3] + design.middle[1]),
    alpha_N=alpha_d * ratio,
    alpha_D=alpha_d,
  )
