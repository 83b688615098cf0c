"""The best size at each budget: from valleys (approach 2) or curves (approach 1).

Hoffmann et al. 2022, sections 3.1 and 3.2. Both end in power laws of compute, and
neither is the surface's frontier: a parabola in ln N is biased where the valley is
asymmetric (alpha unlike beta). With sizes at the same ratios to the minimum at every
budget that shifts all minima alike, and the exponents are right; with sizes that drift
off the centre they are not. On published runs a differs from the surface's by up to
0.07. Print both.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxlm.errors import InputError
from jaxlm.scaling.powers import Optimum, Power, fit_power, optimum
from jaxlm.scaling.surfaces import Floats, Points, column


class Valley(NamedTuple):
  """One budget's losses over sizes; `best.x` is the number of parameters of the least.

  `tokens`: what the budget leaves to a model of that size, by the runs' own tokens.
  """

  flops: float
  best: Optimum
  tokens: float


class Frontier(NamedTuple):
  """N*(C) and D*(C): `parameters` and `tokens` are laws of a regressor `flops`.

  `flops` [m] are the budgets that the laws were fitted to.
  """

  parameters: Power
  tokens: Power
  flops: Floats

  @property
  def exponents(self) -> tuple[float, float]:
    """(a, b): N grows as C^a and D as C^b."""
    return self.parameters.exponents["flops"], self.tokens.exponents["flops"]


class Curve(NamedTuple):
  """One training run with a constant size: tokens seen, FLOPs spent, loss, all [k].

  The schedule matters: a loss before the learning rate has decayed is too high, which
  favours models too small at each budget.
  """

  parameters: float
  tokens: Floats
  flops: Floats
  loss: Floats


class Envelope(NamedTuple):
  """The lowest curve at each budget, all [m]."""

  flops: Floats
  parameters: Floats
  tokens: Floats
  loss: Floats


def valley(data: Points, flops: float, *, nearest: int = 5) -> Valley:
  """Returns the minimum of one budget's runs; `nearest` is `optimum`'s.

  Raises:
    InputError: flops is not positive, or fewer than 3 sizes differ.
  """
  (budget,) = column("flops", [flops])
  best = optimum(data.parameters, data.loss, nearest=nearest)
  order = np.argsort(data.parameters, kind="stable")
  # By the runs' own N and D: whatever counts as FLOPs, 6 N D or exact, is in them.
  size, tokens = np.log(data.parameters[order]), np.log(data.tokens[order])
  return Valley(
    float(budget), best, float(np.exp(np.interp(np.log(best.x), size, tokens)))
  )


def fit_isoflop(valleys: Iterable[Valley]) -> Frontier:
  """Returns the laws through the valleys whose minimum is trusted.

  Raises:
    InputError: fewer than 2 of them, or of the same budget.
  """
  every = list(valleys)
  usable = [each for each in every if each.best.trusted]
  if len({each.flops for each in usable}) < 2:
    raise InputError(
      f"valleys: {len(usable)} of {len(every)} have their minimum between sizes that "
      "were tried; at least 2, of different budgets, are accepted. Add sizes beyond "
      "the best of each budget."
    )
  flops = np.array([each.flops for each in usable])
  return Frontier(
    parameters=fit_power([each.best.x for each in usable], flops=flops),
    tokens=fit_power([each.tokens for each in usable], flops=flops),
    flops=flops,
  )


def curve(
  parameters: float, tokens: npt.ArrayLike, flops: npt.ArrayLike, loss: npt.ArrayLike
) -> Curve:
  """Returns a checked curve.

  Raises:
    InputError: a column is not [k] and positive, lengths differ, k is under 2, or flops
      do not grow.
  """
  (size,) = column("parameters", [parameters])
  columns = [
    column(name, values)
    for name, values in (("tokens", tokens), ("flops", flops), ("loss", loss))
  ]
  lengths = [len(values) for values in columns]
  if len(set(lengths)) > 1 or lengths[0] < 2:
    raise InputError(
      f"curve: {lengths} values of tokens, flops and loss; as many of each are "
      "accepted, and at least 2."
    )
  if not (np.diff(columns[1]) > 0).all():
    raise InputError("flops: they do not grow; increasing values are accepted.")
  return Curve(float(size), *columns)


def envelope(curves: Sequence[Curve], *, budgets: int = 1500) -> Envelope:
  """Returns the lowest curve at so many budgets, spaced by logarithm.

  Hoffmann et al. took 1,500. A curve counts between its first and last FLOPs only. Left
  out are budgets that fewer than two curves reach, and those whose lowest is the
  smallest or the largest of all models: beyond it a better one may lie.

  Raises:
    InputError: budgets is under 2, or no budget remains.
  """
  if budgets < 2:
    raise InputError(f"budgets: {budgets}; at least 2 are accepted.")
  if len({each.parameters for each in curves}) < 3:
    raise InputError("curves: fewer than 3 sizes; at least 3 are accepted.")
  low, high = (min(c.flops[0] for c in curves), max(c.flops[-1] for c in curves))
  grid = np.linspace(np.log(low), np.log(high), budgets)
  losses = np.stack(
    [np.interp(grid, np.log(c.flops), c.loss, np.inf, np.inf) for c in curves]
  )
  tokens = np.stack(
    [np.interp(grid, np.log(c.flops), np.log(c.tokens)) for c in curves]
  )
  sizes = np.array([each.parameters for each in curves])
  lowest, each = losses.argmin(0), np.arange(budgets)
  size = sizes[lowest]
  kept = (np.isfinite(losses).sum(0) > 1) & (sizes.min() < size) & (size < sizes.max())
  if not kept.any():
    raise InputError(
      "curves: at no budget is a size best that has a smaller and a larger one beside "
      "it. Add sizes, or curves that overlap in FLOPs."
    )
  return Envelope(
    flops=np.exp(grid[kept]),
    parameters=size[kept],
    tokens=np.exp(tokens[lowest, each][kept]),
    loss=losses[lowest, each][kept],
  )


def fit_envelope(lowest: Envelope) -> Frontier:
  """Returns the laws through an envelope.

  Its budgets are not independent: neighbours come from one run, so that `rms` and the
  number of rows say nothing about an interval.

  Raises:
    InputError: it holds a single budget.
  """
  return Frontier(
    parameters=fit_power(lowest.parameters, flops=lowest.flops),
    tokens=fit_power(lowest.tokens, flops=lowest.flops),
    flops=lowest.flops,
  )
