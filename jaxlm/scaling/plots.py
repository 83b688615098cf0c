"""Pictures of a study; each function returns a figure, which `save` writes as PNG."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxlm import files
from jaxlm.errors import InputError
from jaxlm.scaling import isoflop
from jaxlm.scaling.store import Row
from jaxlm.scaling.study import Study, Tuned
from jaxlm.scaling.transfer import Coordinate


def save(figure: Figure, file: files.Pathlike) -> None:
  """Writes a figure as PNG."""
  place = files.path(file)
  place.parent.mkdir(parents=True, exist_ok=True)
  with place.open("wb") as stream:
    figure.savefig(stream, format="png", dpi=110)


def _figure(columns: int = 1, *, height: float = 4.2) -> tuple[Figure, list[Axes]]:
  figure = Figure(figsize=(6.2 * columns, height), layout="constrained")
  FigureCanvasAgg(figure)
  axes = list(np.atleast_1d(np.asarray(figure.subplots(1, columns))))
  for each in axes:
    each.grid(alpha=0.3)
  return figure, axes


def _colors(count: int) -> list[Any]:
  return [mpl.colormaps["viridis"](x) for x in np.linspace(0.0, 0.85, max(count, 2))]


def isoflops(made: Study) -> Figure:
  """Draws the losses of each budget over sizes, the parabolas and their minima."""
  figure, (axes,) = _figure()
  valleys = {valley.flops: valley for valley in made.valleys}
  colors = _colors(len(made.budgets))
  for (flops, data), color in zip(made.budgets, colors, strict=True):
    order = np.argsort(data.parameters)
    size, loss = data.parameters[order], data.loss[order]
    axes.plot(size, loss, "o", color=color, label=f"{flops:.2g} FLOPs")
    grid = np.geomspace(size[0], size[-1], 100)
    tokens = flops / made.per / grid
    axes.plot(grid, made.fit.surface.loss(grid, tokens), ":", color=color, lw=1)
    best = valleys[flops].best if flops in valleys else None
    if best is not None and best.trusted:
      curve = best.loss + best.curvature * np.log(grid / best.x) ** 2
      near = np.abs(np.log(grid / best.x)) < 1.2
      axes.plot(grid[near], curve[near], color=color)
      axes.plot(best.x, best.loss, "*", color=color, ms=14, mec="black", mew=0.6)
  axes.set(xscale="log", xlabel="parameters", ylabel="held-out loss, nats a token")
  axes.set_title("parabolas (stars: minima); dotted: the fitted surface", fontsize=9)
  axes.legend(fontsize=8)
  return figure


def frontiers(made: Study, *, reach: float) -> Figure:
  """Draws the best size at each compute, to `reach` times the largest budget."""
  figure, (axes,) = _figure()
  budgets = [flops for flops, _ in made.budgets]
  grid = np.geomspace(budgets[0], reach * budgets[-1], 60)
  for valley in made.valleys:
    if valley.best.trusted:
      axes.plot(valley.flops, valley.best.x, "*", color="tab:blue", ms=13)
  for (name, found), color in zip(
    made.frontiers.items(), ("tab:green", "tab:blue"), strict=True
  ):
    if isinstance(found, isoflop.Frontier):
      line = found.parameters.predict(flops=grid)
      axes.plot(
        grid, line, "--", color=color, label=f"{name}: a = {found.exponents[0]:.2f}"
      )
  if len(made.bounded) > 1:
    spread = np.array([s.frontier(grid, per=made.per)[0] for s in made.bounded])
    low, high = np.percentile(spread, (2.5, 97.5), axis=0)
    axes.fill_between(grid, low, high, color="tab:orange", alpha=0.2)
  if (surface := made.fit.surface).has_frontier:
    label = f"approach 3: a = {surface.exponents[0]:.2f}, 95%"
    best = surface.frontier(grid, per=made.per)[0]
    axes.plot(grid, best, color="tab:orange", label=label)
  axes.set(
    xscale="log", yscale="log", xlabel="FLOPs", ylabel="best number of parameters"
  )
  axes.legend(fontsize=8)
  return figure


def predictions(made: Study, others: Sequence[Row]) -> Figure:
  """Draws predicted over measured loss: of the rows fitted, and of others."""
  figure, (axes,) = _figure()
  for row in made.rows:
    axes.plot(row["loss"], made.predict(row).loss, "o", color="tab:blue", ms=4)
  for row in others:
    told = made.predict(row)
    below, above = told.loss - told.of_run.low, told.of_run.high - told.loss
    axes.errorbar(
      row["loss"], told.loss, [[below], [above]], fmt="s", color="tab:red", capsize=3,
      label=f"not fitted: {row['parameters']:,} parameters, {row['tokens']:,} tokens",
    )  # fmt: skip
  losses = [row["loss"] for row in (*made.rows, *others)]
  ends = [min(losses) * 0.98, max(losses) * 1.02]
  axes.plot(ends, ends, color="grey", lw=0.8)
  axes.set(xlabel="measured loss, nats a token", ylabel="predicted loss")
  if others:
    axes.legend(fontsize=8)
  return figure


def learning_rates(sets: dict[str, Sequence[Tuned]]) -> Figure:
  """Draws losses over learning rates, a curve a width, a panel for each set.

  Raises:
    InputError: there is no set.
  """
  if not sets:
    raise InputError("sets: none to draw.")
  figure, panels = _figure(len(sets))
  for axes, (name, tuned) in zip(panels, sets.items(), strict=True):
    for each, color in zip(tuned, _colors(len(tuned)), strict=True):
      label = f"width {each.dim}, {each.parameters:,} parameters"
      axes.plot(each.peaks, each.losses, "o-", color=color, label=label, ms=3)
      axes.plot(each.best.x, each.best.loss, "*", color=color, ms=13, mec="black")
    axes.set(
      xscale="log", xlabel="peak learning rate", ylabel="held-out loss, nats a token"
    )
    axes.set_title(name)
    axes.legend(fontsize=8)
  return figure


def coordinates(sets: dict[str, Sequence[Coordinate]]) -> Figure:
  """Draws how far each part has moved by the last step, over width, a panel a set.

  Raises:
    InputError: there is no set.
  """
  if not sets:
    raise InputError("sets: none to draw.")
  figure, panels = _figure(len(sets))
  for axes, (name, rows) in zip(panels, sets.items(), strict=True):
    last = max(row.step for row in rows)
    parts = list(dict.fromkeys(row.part for row in rows))
    for part, color in zip(parts, _colors(len(parts)), strict=True):
      moved = [(r.width, r.change) for r in rows if r.part == part and r.step == last]
      axes.plot(*zip(*moved, strict=True), "o-", color=color, label=part, ms=3)
    axes.set(xscale="log", yscale="log", xlabel="width")
    axes.set_ylabel(f"change after {last} steps (root mean square)")
    axes.set_title(name)
    axes.legend(fontsize=8)
  return figure
