r"""The fit of Besiroglu et al. 2024 (Epoch), from the points they read off a figure.

    uv run python experiments/scaling_laws/epoch.py PATH_OF_THE_CSV

The csv (columns "Model Size", "Training FLOP", loss) states no licence, so it is not
here: it is `data/svg_extracted_data.csv` of epoch-research/analyzing-chinchilla on
GitHub. epoch.txt is what this printed.
"""

import csv
import pathlib
import sys
import time

import numpy as np

from jaxlm.scaling import intervals
from jaxlm.scaling.fit import fit_kaplan, fit_projected, fit_surface, log_residuals
from jaxlm.scaling.surfaces import Surface, points

NAMES = ("A", "B", "E", "alpha", "beta")
PUBLISHED = {
  "A": (482.01, 124.58, None),
  "B": (2085.43, 1293.23, None),
  "E": (1.8169, 0.0257, (1.769, 1.871)),
  "alpha": (0.3478, 0.0154, (0.317, 0.373)),
  "beta": (0.3659, 0.0206, (0.331, 0.415)),
}
OUTLIERS = 5
SAMPLES = 1000


def shown(surface: Surface) -> str:
  values = "  ".join(f"{name} {getattr(surface, name):.6g}" for name in NAMES)
  return f"{values}  a {surface.exponents[0]:.4f}"


def main(path: str) -> None:
  with pathlib.Path(path).open() as file:
    rows = list(csv.DictReader(file))
  size = np.array([float(row["Model Size"]) for row in rows])
  flops = np.array([float(row["Training FLOP"]) for row in rows])
  loss = np.array([float(row["loss"]) for row in rows])
  every = points(size, flops / (6 * size), loss)
  data = every.take(np.sort(np.argsort(loss)[:-OUTLIERS]))

  began = time.monotonic()
  fit = fit_surface(data)
  spent = time.monotonic() - began
  print(
    f"{len(data.loss)} points, the {OUTLIERS} highest losses left out; {spent:.1f} s"
  )
  print(f"  fit_surface    {shown(fit.surface)}")
  print(f"  objective {fit.objective:.10f}; {fit.agreeing:.0%} of the starts within 1%")
  print(f"  rms of log residuals {fit.rms:.5f}, R^2 {fit.r2:.5f}")
  print(f"  fit_projected  {shown(fit_projected(data))}")
  kaplan = fit_kaplan(data)
  rms = np.sqrt(np.mean(log_residuals(kaplan, data) ** 2))
  print(
    f"  fit_kaplan     alpha_N {kaplan.alpha_N:.4f}  alpha_D {kaplan.alpha_D:.4f}  "
    f"rms of log residuals {rms:.5f}"
  )

  began = time.monotonic()
  surfaces = intervals.bootstrap(data, fit, samples=SAMPLES, seed=0)
  spent = time.monotonic() - began
  print(f"\n{SAMPLES} bootstraps, {spent:.0f} s; Epoch's table (4,000) beside")
  print(
    "         here      error     95% interval        Epoch     error     95% interval"
  )
  for name in NAMES:
    found = intervals.interval([getattr(surface, name) for surface in surfaces])
    value, error, bounds = PUBLISHED[name]
    theirs = f"({bounds[0]:.3f}, {bounds[1]:.3f})" if bounds else ""
    ours = f"({found.low:.4g}, {found.high:.4g})"
    print(
      f"  {name:5}  {getattr(fit.surface, name):<8.5g}  {found.error:<8.4g}  "
      f"{ours:18}  {value:<8.5g}  {error:<8.5g}  {theirs}".rstrip()
    )
  found = intervals.exponent(surfaces)
  print(
    f"  a      {fit.surface.exponents[0]:<8.5g}  {found.error:<8.4g}  "
    f"({found.low:.4g}, {found.high:.4g})"
  )

  kept = fit_surface(every)
  print(f"\nall {len(loss)} points, outliers kept")
  print(f"  fit_surface    {shown(kept.surface)}")
  print(
    f"  objective {kept.objective:.10f}; {kept.agreeing:.0%} of the starts within 1%"
  )
  print(f"  fit_projected  {shown(fit_projected(every))}")


if __name__ == "__main__":
  main(sys.argv[1])
