"""Power laws of settings: y = scale * x1^e1 * x2^e2, and the optimum of one setting.

For what is best at a size: peak learning rate and batch as functions of parameters and
tokens, parameters and tokens as functions of compute.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxlm.errors import InputError
from jaxlm.scaling.surfaces import Floats, column, exponential


@dataclasses.dataclass(frozen=True)
class Power:
  """y = scale * product of x_i^exponents[i].

  `rms`: root mean square of the log residuals, 0.05 being about 5%.
  """

  scale: float
  exponents: Mapping[str, float]
  rms: float

  def predict(self, **x: npt.ArrayLike) -> Floats:
    """Returns y at positive regressors that broadcast, named as they were fitted.

    Raises:
      InputError: the names are others than those of the fit.
    """
    if set(x) != set(self.exponents):
      raise InputError(
        f"predict: {sorted(x)} are given; {sorted(self.exponents)} are accepted."
      )
    y = np.asarray(self.scale, np.float64)
    for name, exponent in self.exponents.items():
      y = y * np.asarray(x[name], np.float64) ** exponent
    return y


def fit_power(y: npt.ArrayLike, **x: npt.ArrayLike) -> Power:
  """Returns the law with the least squares of log residuals; y and each x are [n].

  Raises:
    InputError: a column is not [n] and positive, or the columns do not fix the
      exponents: too few rows, a constant column, two that move together.
  """
  target = np.log(column("y", y))
  if not x:
    raise InputError("fit_power: no regressors; at least one named column is accepted.")
  logs = {name: np.log(column(name, values)) for name, values in x.items()}
  for name, values in logs.items():
    if len(values) != len(target):
      raise InputError(
        f"{name}: {len(values)} values; {len(target)} are accepted, as y."
      )
  if not len(target):
    raise InputError(f"y: no rows; at least {len(logs) + 1} are accepted.")
  # Centred, so that the rank test below speaks of the columns' spread alone.
  means = {name: values.mean() for name, values in logs.items()}
  spread = np.stack([values - means[name] for name, values in logs.items()], 1)
  found, _, rank, _ = np.linalg.lstsq(spread, target - target.mean(), rcond=1e-9)
  if rank < len(logs) or np.ptp(spread, axis=0).min() < 1e-9:
    raise InputError(
      f"{', '.join(logs)}: {len(target)} rows that do not vary enough; at least "
      f"{len(logs) + 1} rows are accepted, no column constant or a power of others."
    )
  exponents = {name: float(value) for name, value in zip(logs, found, strict=True)}
  level = target.mean() - sum(exponents[name] * means[name] for name in logs)
  residuals = spread @ found + target.mean() - target
  return Power(
    scale=exponential("scale", level),
    exponents=exponents,
    rms=float(np.sqrt(np.mean(residuals**2))),
  )


class Optimum(NamedTuple):
  """The best of a sweep over one setting.

  Where `trusted` is false, `x` and `loss` are those of the best point tried: it lies at
  the sweep's edge (`at_edge`), or the points bend the wrong way (`convex` is false).
  `curvature`: c of loss = least + c * (ln x - ln best)^2.
  """

  x: float
  loss: float
  curvature: float
  at_edge: bool
  convex: bool

  @property
  def trusted(self) -> bool:
    """Whether `x` is the minimum of a parabola between points that were tried."""
    return self.convex and not self.at_edge


def optimum(x: npt.ArrayLike, loss: npt.ArrayLike, *, nearest: int = 5) -> Optimum:
  """Returns the minimum of a parabola in ln x, fitted to the points around the best.

  Args:
    x: the setting [n], in any order.
    loss: the losses [n].
    nearest: so many points, by their distance in ln x from the best. Far from the
      minimum losses are no parabola: asymmetry biases it. Points as far as the last
      of them count too. 3: interpolation where all settings differ.

  Raises:
    InputError: a column is not [n] and positive, or fewer than 3 settings differ.
  """
  place, height = np.log(column("x", x)), column("loss", loss)
  if len(place) != len(height):
    raise InputError(f"loss: {len(height)} values; {len(place)} are accepted, as x.")
  if (distinct := len(np.unique(place))) < 3:
    raise InputError(f"x: {distinct} distinct values; at least 3 are accepted.")
  if nearest < 3:
    raise InputError(f"nearest: {nearest}; at least 3 are accepted.")
  best = int(np.argmin(height))
  distance = np.abs(place - place[best])
  # Repeats of a setting are kept together, and a parabola needs three settings.
  reach = max(
    np.sort(distance)[min(nearest, len(place)) - 1], np.unique(distance)[:3].max()
  )
  near = distance <= reach * (1 + 1e-9)
  if len(np.unique(place[near])) < 3:
    near = np.ones_like(near)
  offset = place[near] - place[best]
  columns = np.stack([offset**2, offset, np.ones_like(offset)], 1)
  curvature, slope, level = np.linalg.lstsq(columns, height[near], rcond=None)[0]
  edge = place[best] in (place.min(), place.max())
  convex = bool(curvature > 1e-12)
  lowest = -slope / (2 * curvature) if convex else np.nan
  inside = convex and offset.min() <= lowest <= offset.max()
  if edge or not inside:
    bottom, least = place[best], height[best]
  else:
    bottom, least = place[best] + lowest, level - slope**2 / (4 * curvature)
  return Optimum(
    x=float(np.exp(bottom)),
    loss=float(least),
    curvature=float(curvature),
    at_edge=bool(edge or (convex and not inside)),
    convex=convex,
  )
