"""From rows to laws: rows of a planted surface and a planted learning rate."""

import dataclasses
import math

import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.scaling import plots
from jaxlm.scaling.study import (
  best_of,
  budgets_of,
  choose_peak,
  fit_learning_rate,
  learning_rates,
  study,
  table,
)
from jaxlm.scaling.surfaces import Surface
from jaxlm.scaling.transfer import Coordinate

PLANTED = Surface(E=1.2, A=50.0, B=200.0, alpha=0.4, beta=0.35)
PER = 7.0


def law(size, tokens):
  return 300.0 * size**-0.4 * tokens**-0.35


def row(size, flops, peak, noise=0.0):
  tokens = round(flops / PER / size)
  off = math.log(peak / law(size, tokens))
  loss = float(PLANTED.loss(size, tokens)) * math.exp(0.02 * off**2 + noise)
  seen = np.geomspace(tokens / 8, tokens, 6)
  return {
    "key": f"{size}-{flops}-{peak}", "parameters": size, "tokens": tokens,
    "flops": {"causal": PER * size * tokens, "all": 6.0 * size * tokens},
    "dim": 8, "layers": 1, "steps": 10, "batch": 2, "seq_len": 4, "seed": 0,
    "peak": peak, "loss": loss, "bits_per_byte": loss / math.log(2), "seconds": 1.0,
    "corpus": "text", "optimizer": "Muon", "together": 1, "diverged_at": None,
    "curve": [[float(d), float(PLANTED.loss(size, d))] for d in seen],
  }  # fmt: skip


@pytest.fixture(scope="module")
def rows():
  rng, found = np.random.default_rng(0), []
  for flops in (1e12, 4e12, 1.6e13):
    best = float(PLANTED.frontier(flops, per=PER)[0])
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
      size = round(best * factor)
      middle = law(size, flops / PER / size)
      found += [
        row(size, flops, middle * shift, 1e-3 * rng.standard_normal())
        for shift in (0.3, 0.8, 2.0)
      ]
  wild = found[0] | {"peak": 1.0, "loss": None, "diverged_at": 3}
  return [*found, wild]


@pytest.fixture(scope="module")
def made(rows):
  return study(rows, samples=12, seed=0)


def test_of_each_size_and_length_the_best_counts(rows, made):
  assert len(rows) == 46
  assert len(made.rows) == 15
  assert made.diverged == 1
  for kept in made.rows:
    same = [r for r in rows if r["parameters"] == kept["parameters"] and r["loss"]]
    same = [r for r in same if r["tokens"] == kept["tokens"]]
    assert kept["loss"] == min(r["loss"] for r in same)


def test_seeds_are_averaged_before_the_best_rate_is_chosen(rows):
  one = rows[0]
  seeds = [one | {"seed": s, "loss": loss} for s, loss in enumerate((2.0, 2.4))]
  other = one | {"peak": 1.0, "loss": 2.1}
  (best,) = best_of([*seeds, other])
  assert (best["peak"], best["loss"]) == (1.0, 2.1)


@pytest.mark.parametrize("field", ["corpus", "seq_len"])
def test_rows_that_do_not_compare_are_refused(rows, field):
  with pytest.raises(InputError, match=f"rows: of {field}"):
    best_of([rows[0], rows[1] | {field: 99 if field == "seq_len" else "other"}])


def test_one_that_diverged_is_compared_too(made):
  wild = row(30_000, 1e14, 1e-2) | {"loss": None, "diverged_at": 7}
  assert "diverged at step 7" in made.compare(wild)


def test_rows_are_grouped_by_budget(rows):
  groups = budgets_of(best_of(rows))
  assert [len(data.loss) for _, data in groups] == [5, 5, 5]
  assert [flops for flops, _ in groups] == pytest.approx([1e12, 4e12, 1.6e13], rel=1e-3)


def test_what_was_planted_is_found(made):
  assert made.per == pytest.approx(PER)
  a = PLANTED.exponents[0]
  low, high = (f([s.exponents[0] for s in made.bounded]) for f in (np.min, np.max))
  assert low - 0.02 < a < high + 0.02
  assert made.frontiers["approach 2"].exponents[0] == pytest.approx(a, abs=0.05)
  larger = row(30_000, 1e14, law(30_000, 1e14 / PER / 30_000))
  told = made.predict(larger)
  assert told.loss == pytest.approx(larger["loss"], rel=0.01)
  assert told.of_run.low < told.loss < told.of_run.high


def test_what_it_says(made):
  text = made.describe()
  for words in (
    "15 sizes and lengths, 3 budgets, 1 runs diverged", "alpha", "rms", "approach 1",
    "approach 2", "approach 3", "projection", "backtest",
  ):  # fmt: skip
    assert words in text
  larger = row(30_000, 1.6e14, 1e-2)
  assert "10.00 times the FLOPs" in made.compare(larger)
  assert "inside" in made.compare(larger) or "OUTSIDE" in made.compare(larger)
  far = larger | {"loss": 9.0}
  assert "OUTSIDE" in made.compare(far)
  assert "1e+14 FLOPs" in made.ask(1e14)


def test_the_law_of_learning_rates(rows):
  tuned = learning_rates(rows)
  assert len(tuned) == 15
  found = fit_learning_rate(tuned)
  assert found.exponents["parameters"] == pytest.approx(-0.4, abs=0.03)
  assert found.exponents["tokens"] == pytest.approx(-0.35, abs=0.03)
  peak, why = choose_peak(tuned, 20_000, 10**9)
  assert peak == pytest.approx(law(20_000, 10**9), rel=0.15)
  assert "N^-0.4" in why
  few, why = choose_peak(tuned[:2], 20_000, tuned[1].tokens)
  assert few == tuned[1].best.x
  assert "at least 4 are accepted" in why
  with pytest.raises(InputError, match="tuned: none"):
    choose_peak([], 1, 1)


def test_samples_that_fix_no_frontier_are_told(made):
  """Loss that grows with size has no best size."""
  wrong = dataclasses.replace(PLANTED, alpha=-0.1)
  some = made._replace(surfaces=[*made.surfaces[:8], wrong, wrong])
  assert "2 OF 10 BOOTSTRAP SAMPLES HAVE NO FRONTIER" in some.describe()
  plots.frontiers(some, reach=2)
  none = made._replace(surfaces=[wrong] * 2, fit=made.fit._replace(surface=wrong))
  assert "approach 3: alpha: -0.1; a frontier needs" in none.describe()
  plots.frontiers(none, reach=2)
  with pytest.raises(InputError, match=r"alpha: -0\.1"):
    none.ask(1e14)


def test_a_table_is_flat(rows):
  (first, *_) = table(rows)
  assert first["flops_causal"] == rows[0]["flops"]["causal"]
  assert not [value for value in first.values() if isinstance(value, dict | list)]


def test_pictures(made, rows, tmp_path):
  moved = [Coordinate(w, 2, p, 1.0, 0.5) for w in (8, 16) for p in ("a", "b")]
  figures = [
    plots.isoflops(made),
    plots.frontiers(made, reach=4),
    plots.predictions(made, [row(30_000, 1e14, 1e-2)]),
    plots.learning_rates({"x": learning_rates(rows)[:3]}),
    plots.coordinates({"x": moved, "y": moved}),
  ]
  for number, figure in enumerate(figures):
    plots.save(figure, tmp_path / "deep" / f"{number}.png")
    data = (tmp_path / "deep" / f"{number}.png").read_bytes()
    assert data[:4] == b"\x89PNG"
    assert len(data) > 5000
  lines = figures[0].axes[0].lines
  # Of each budget the points, the surface, a parabola and its minimum.
  assert len(lines) == 12
  with pytest.raises(InputError, match="none to draw"):
    plots.coordinates({})
