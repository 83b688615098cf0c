"""The pictures and rows of RESULT.md, from the sweeps' workdirs.

    uv run python experiments/scaling_laws/figures.py --runs=runs/scaling_laws/real

The folder holds grid, larger, mup and standard, as the notebook leaves them.
"""

import csv
import pathlib

from absl import app, flags

from jaxlm.scaling import plots
from jaxlm.scaling.store import Store
from jaxlm.scaling.study import choose_peak, learning_rates, study, table

HERE = pathlib.Path(__file__).parent
RUNS = flags.DEFINE_string("runs", "runs/scaling_laws/real", "Where the sweeps are.")


def main(_) -> None:
  rows = {
    part: Store(f"{RUNS.value}/{part}/rows").rows()
    for part in ("grid", "larger", "mup", "standard")
  }
  made = study(rows["grid"], samples=1000, seed=0)
  print(made.describe())
  (larger,) = rows["larger"]
  tuned = learning_rates(rows["grid"])
  print(*choose_peak(tuned, larger["parameters"], larger["tokens"]))
  print(made.compare(larger))
  print(made.ask(10 * larger["flops"]["causal"]))
  for part in ("mup", "standard"):
    for each in learning_rates(rows[part]):
      best = each.peaks[each.losses.index(min(each.losses))]
      print(f"{part} width {each.dim}: best {best:.4g}, loss {min(each.losses):.3f}")
  plots.save(plots.isoflops(made), HERE / "isoflops.png")
  plots.save(plots.frontiers(made, reach=5), HERE / "frontiers.png")
  plots.save(plots.predictions(made, [larger]), HERE / "predictions.png")
  sets = {"muP": learning_rates(rows["mup"])}
  sets["standard"] = learning_rates(rows["standard"])
  plots.save(plots.learning_rates(sets), HERE / "learning_rates.png")
  flat = [{"part": part} | row for part in rows for row in table(rows[part])]
  with (HERE / "rows.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, flat[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)


if __name__ == "__main__":
  app.run(main)
