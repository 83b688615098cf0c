"""From the rows of a sweep to its laws: what a notebook asks, in the order it asks.

made = study(Store("runs/laws/rows").rows(), samples=1000, seed=0)
print(made.describe())
made.predict(larger_row)
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxlm.errors import InputError
from jaxlm.scaling import intervals, isoflop
from jaxlm.scaling.fit import Fit, fit_projected, fit_surface
from jaxlm.scaling.isoflop import Frontier, Valley
from jaxlm.scaling.powers import Optimum, Power, fit_power, optimum
from jaxlm.scaling.store import Row
from jaxlm.scaling.surfaces import Points, Surface, points

APART = 1.2
"""Rows whose FLOPs differ by less than this are of one budget."""
NEAREST = 5
"""Sizes around the best that a parabola is laid through."""


class Study(NamedTuple):
  """What the rows say."""

  rows: list[Row]
  """The best of each size and length."""
  diverged: int
  """Rows left out, for their run diverged."""
  budgets: list[tuple[float, Points]]
  """FLOPs (causal) and the points of each."""
  fit: Fit
  """Approach 3."""
  surfaces: list[Surface]
  """Its bootstrap."""
  projected: Surface
  """By variable projection, to compare."""
  valleys: list[Valley]
  """Approach 2, a budget each; some may have no minimum that can be trusted."""
  frontiers: dict[str, Frontier | InputError]
  """Laws by approach 1 and 2, or why there is none."""
  backtest: intervals.Backtest | InputError
  """The largest budget foretold from the others, or why not."""
  least: Power | InputError
  """The valleys' least loss as a power of FLOPs, without a floor; or why not."""

  @property
  def per(self) -> float:
    """FLOPs over N D: 6 by the rule, more with attention and the head."""
    return math.exp(float(np.mean(np.log(self._ratios))))

  @property
  def _ratios(self) -> list[float]:
    return [r["flops"]["causal"] / r["parameters"] / r["tokens"] for r in self.rows]

  def predict(self, row: Row) -> intervals.Prediction:
    """Returns the loss of another run by approach 3, with intervals."""
    return intervals.predict(self.fit, self.surfaces, row["parameters"], row["tokens"])

  def compare(self, row: Row) -> str:
    """Returns what was foretold of another run, and what it reached."""
    told, loss = self.predict(row), row["loss"]
    if loss is None:
      return f"it diverged at step {row['diverged_at']}; {told.loss:.4f} was predicted"
    largest = max(flops for flops, _ in self.budgets)
    flops = row["flops"]["causal"]
    least = f"; {self.least}"
    if not isinstance(self.least, InputError):
      value = float(self.least.predict(flops=flops))
      least = f"; by the valleys' least losses {value:.4f}, {loss / value - 1:+.2%}"
    inside = told.of_run.low <= loss <= told.of_run.high
    return (
      f"{row['parameters']:,} parameters, {row['tokens']:,} tokens, "
      f"{flops / largest:.2f} times the FLOPs of the largest budget "
      f"fitted: predicted {told.loss:.4f}, 95% of a run {told.of_run.low:.4f} to "
      f"{told.of_run.high:.4f}, of the curve {told.of_curve.low:.4f} to "
      f"{told.of_curve.high:.4f}; measured {loss:.4f}, "
      f"{'inside' if inside else 'OUTSIDE'}, {loss / told.loss - 1:+.2%}{least}"
    )

  def ask(self, flops: float) -> str:
    """Returns the best size for a budget, and what it would reach, with intervals.

    Raises:
      InputError: the fit has no frontier.
    """
    N, D = self.fit.surface.frontier(flops, per=self.per)
    sizes = [s.frontier(flops, per=self.per)[0] for s in self.bounded]
    low, high, _ = intervals.interval(sizes)
    told = intervals.predict(self.fit, self.surfaces, float(N), float(D))
    return (
      f"{flops:.3g} FLOPs: {float(N):,.0f} parameters (95% {low:,.0f} to {high:,.0f}) "
      f"on {float(D):,.0f} tokens, {float(D / N):.1f} a parameter; loss "
      f"{told.loss:.4f}, 95% of a run {told.of_run.low:.4f} to {told.of_run.high:.4f}"
    )

  def _spread(self) -> list[str]:
    """Returns the interval of approach 3's exponent, and what it leaves out."""
    kept, total = self.bounded, len(self.surfaces)
    lines = []
    if len(kept) > 1:
      a = intervals.exponent(kept)
      lines.append(f"    95% {a.low:.3f} to {a.high:.3f}, standard error {a.error:.2g}")
    if len(kept) < total:
      lines.append(
        f"    {total - len(kept)} OF {total} BOOTSTRAP SAMPLES HAVE NO FRONTIER, and "
        "are left out: the rows are too few or too noisy"
      )
    return lines

  @property
  def bounded(self) -> list[Surface]:
    """The surfaces of the bootstrap in which loss falls with both N and D."""
    return [each for each in self.surfaces if each.has_frontier]

  def describe(self) -> str:
    """Returns the laws with intervals, and how far the approaches disagree."""
    lines = [
      f"{len(self.rows)} sizes and lengths, {len(self.budgets)} budgets, "
      f"{self.diverged} runs diverged"
    ]
    table = intervals.coefficients(self.surfaces)
    for name, column in zip(("E", "A", "B", "alpha", "beta"), table.T, strict=True):
      low, high, error = intervals.interval(column)
      value = getattr(self.fit.surface, name)
      lines.append(
        f"  {name:<6}{value:>11.4g}   95% {low:.4g} to {high:.4g}, standard error "
        f"{error:.2g}"
      )
    lines.append(
      f"  of log losses the fit leaves {self.fit.rms:.2%} (rms), R2 {self.fit.r2:.4f}; "
      f"{self.fit.agreeing:.0%} of the starts end there"
    )
    lines.append(
      f"  FLOPs are {min(self._ratios):.2f} to {max(self._ratios):.2f} times N D; the "
      f"surface's frontier takes {self.per:.2f} at every size"
    )
    lines.append("N grows as C^a:")
    for name, found in self.frontiers.items():
      lines.append(f"  {name}: {_exponent(found)}")
    lines += [f"  approach 3: {_exponent(self.fit.surface)}", *self._spread()]
    lines.append(f"  by variable projection: {_exponent(self.projected)}")
    if isinstance(self.backtest, InputError):
      lines.append(f"backtest: {self.backtest}")
    else:
      worst = float(np.abs(self.backtest.errors).max())
      lines.append(
        f"backtest: the largest budget foretold from the others, off by "
        f"{float(np.abs(self.backtest.errors).mean()):.2%} on average, {worst:.2%} at "
        "worst"
      )
    return "\n".join(lines)


def _exponent(found: Surface | Frontier | InputError) -> str:
  try:
    return (
      str(found) if isinstance(found, InputError) else f"a = {found.exponents[0]:.3f}"
    )
  except InputError as error:
    return str(error)


def study(rows: Sequence[Row], *, samples: int, seed: int) -> Study:
  """Returns the laws of a sweep, with so many bootstrap samples.

  Raises:
    InputError: the rows are too few for a surface.
  """
  kept = best_of(rows)
  data = points_of(kept)
  fit = fit_surface(data)
  grouped = budgets_of(kept)
  valleys = [
    isoflop.valley(each, flops, nearest=NEAREST)
    for flops, each in grouped
    if len(np.unique(each.parameters)) > 2
  ]
  curves = [
    isoflop.curve(row["parameters"], *_curve(row))
    for row in kept
    if len(row["curve"]) > 1
  ]
  return Study(
    rows=kept,
    diverged=sum(row["diverged_at"] is not None for row in rows),
    budgets=grouped,
    fit=fit,
    surfaces=intervals.bootstrap(data, fit, samples=samples, seed=seed),
    projected=fit_projected(data),
    valleys=valleys,
    frontiers={
      "approach 1": _tried(lambda: isoflop.fit_envelope(isoflop.envelope(curves))),
      "approach 2": _tried(lambda: isoflop.fit_isoflop(valleys)),
    },
    least=_tried(
      lambda: fit_power(
        [each.best.loss for each in valleys if each.best.trusted],
        flops=[each.flops for each in valleys if each.best.trusted],
      )
    ),
    backtest=_tried(
      lambda: intervals.backtest(
        data, [row["flops"]["causal"] for row in kept], held=1 / APART
      )
    ),
  )


def _tried(make: Any) -> Any:
  try:
    return make()
  except InputError as error:
    return error


def best_of(rows: Sequence[Row]) -> list[Row]:
  """Returns of each size and length the row of the best learning rate.

  Its loss is the mean over the seeds that had this rate.

  Raises:
    InputError: the rows are of several texts or lengths of a row, whose losses do not
      compare.
  """
  for field in ("corpus", "seq_len"):
    if len(found := sorted({row[field] for row in rows})) > 1:
      raise InputError(
        f"rows: of {field} {found}; one is accepted. Choose rows of one."
      )
  ended = [row for row in rows if row["loss"] is not None]
  seeds: dict[tuple, list[Row]] = {}
  for row in ended:
    at = row["parameters"], row["tokens"], row["batch"], row["optimizer"], row["peak"]
    seeds.setdefault(at, []).append(row)
  best: dict[tuple, Row] = {}
  for at, same in seeds.items():
    mean = same[0] | {"loss": float(np.mean([row["loss"] for row in same]))}
    place = at[:2]
    if place not in best or mean["loss"] < best[place]["loss"]:
      best[place] = mean
  return list(best.values())


def points_of(rows: Sequence[Row]) -> Points:
  """Returns N of all parameters, D and held-out loss of rows.

  Raises:
    InputError: they are too few for a surface.
  """
  columns = ([row[n] for row in rows] for n in ("parameters", "tokens", "loss"))
  return points(*columns)


def budgets_of(rows: Sequence[Row]) -> list[tuple[float, Points]]:
  """Returns the rows by budget: its geometric mean of FLOPs, and its points."""
  ordered = sorted(rows, key=lambda row: row["flops"]["causal"])
  groups: list[list[Row]] = []
  for row in ordered:
    flops = row["flops"]["causal"]
    if groups and flops < APART * groups[-1][0]["flops"]["causal"]:
      groups[-1].append(row)
    else:
      groups.append([row])
  return [
    (
      math.exp(float(np.mean([math.log(row["flops"]["causal"]) for row in group]))),
      Points(
        *(
          np.array([row[name] for row in group], np.float64)
          for name in ("parameters", "tokens", "loss")
        )
      ),
    )
    for group in groups
  ]


def _curve(row: Row) -> tuple[list[float], list[float], list[float]]:
  tokens = [seen for seen, _ in row["curve"]]
  each = row["flops"]["causal"] / row["tokens"]
  return tokens, [each * seen for seen in tokens], [loss for _, loss in row["curve"]]


class Tuned(NamedTuple):
  """The learning rates tried of one size and length."""

  parameters: int
  tokens: int
  dim: int
  peaks: list[float]
  losses: list[float]
  best: Optimum


def learning_rates(rows: Sequence[Row]) -> list[Tuned]:
  """Returns the best learning rate of each size and length with three or more."""

  def place(row: Row) -> tuple[int, int, int]:
    return row["parameters"], row["tokens"], row["dim"]

  found = []
  ended = sorted((row for row in rows if row["loss"] is not None), key=place)
  for (size, tokens, dim), group in itertools.groupby(ended, place):
    tried = sorted((row["peak"], row["loss"]) for row in group)
    if len({peak for peak, _ in tried}) > 2:
      peaks, losses = map(list, zip(*tried, strict=True))
      best = optimum(peaks, losses, nearest=3)
      found.append(Tuned(size, tokens, dim, peaks, losses, best))
  return found


def fit_learning_rate(tuned: Sequence[Tuned]) -> Power:
  """Returns the law of the best learning rate in parameters and tokens.

  Raises:
    InputError: too few sizes and lengths have their best within the rates tried.
  """
  usable = [each for each in tuned if each.best.trusted]
  if len(usable) < 4:
    raise InputError(
      f"tuned: of {len(tuned)} sizes and lengths {len(usable)} have their best within "
      "the learning rates tried; at least 4 are accepted. Add rates at the edge."
    )
  return fit_power(
    [each.best.x for each in usable],
    parameters=[each.parameters for each in usable],
    tokens=[each.tokens for each in usable],
  )


def choose_peak(
  tuned: Sequence[Tuned], parameters: int, tokens: int
) -> tuple[float, str]:
  """Returns the learning rate for another run, and where it comes from.

  It is the law's, or where the rows fix none, that of the run nearest in tokens.

  Raises:
    InputError: there is nothing to choose from.
  """
  try:
    law = fit_learning_rate(tuned)
  except InputError as error:
    if not tuned:
      raise InputError("tuned: none; give rows of three learning rates.") from error
    among = [each for each in tuned if each.best.trusted] or tuned
    near = min(among, key=lambda each: abs(math.log(each.tokens / tokens)))
    edge = "" if near.best.trusted else ", AT THE EDGE of the rates tried"
    why = f"that of the run with {near.tokens:,} tokens{edge}, for {error}"
    return near.best.x, why
  value = float(law.predict(parameters=parameters, tokens=tokens))
  n, d = law.exponents["parameters"], law.exponents["tokens"]
  return value, f"{law.scale:.3g} x N^{n:.2f} x D^{d:.2f}, within {law.rms:.0%} (rms)"


COLUMNS = (
  "dim", "layers", "parameters", "tokens", "steps", "peak", "seed", "loss",
  "bits_per_byte", "seconds", "together", "key",
)  # fmt: skip


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """Returns rows with one level of fields, as a data frame takes them."""
  return [
    {name: row[name] for name in COLUMNS}
    | {f"flops_{name}": value for name, value in row["flops"].items()}
    for row in rows
  ]
