"""Draws methods.png and prints RESULT.md's table from results.jsonl.

uv run python experiments/adapters/plot.py
"""

import json
import pathlib

import matplotlib.pyplot as plt

HERE = pathlib.Path(__file__).parent
BESIDE = {"lora": (-30, -14), "rslora": (6, -14), "dora": (6, 4), "full": (-24, 6)}
"""Where a label stands that would cover another."""


def main() -> None:
  rows: dict[str, dict] = {}
  for line in (HERE / "results.jsonl").read_text().splitlines():
    row = json.loads(line)
    rows[row["method"]] = rows.get(row["method"], {}) | row
  print(
    "| method | trains | share | held-out bits per byte | nats a token | checkpoint MB "
    "| peak GB | s a step |\n|---|---|---|---|---|---|---|---|"
  )
  for name, row in rows.items():
    print(
      f"| {name} | {row['trained']:,} | {row['share']:g}% "
      f"| {row['bits_per_byte'][-1]:.4f} | {row['nll'][-1]:.4f} "
      f"| {row['checkpoint_mb']:,.1f} | {row['peak_gb']:.2f} "
      f"| {row['seconds_a_step']:.2f} |"
    )
  figure, axes = plt.subplots(figsize=(7, 4))
  for name, row in rows.items():
    axes.scatter(row["share"], row["bits_per_byte"][-1])
    place = (row["share"], row["bits_per_byte"][-1])
    axes.annotate(
      name, place, textcoords="offset points", xytext=BESIDE.get(name, (5, 3))
    )
  axes.axhline(next(iter(rows.values()))["bits_per_byte"][0], ls=":", color="gray")
  axes.set(
    xscale="log",
    xlabel="trained parameters, % of the model",
    ylabel="held-out bits per byte, 40 steps",
    title="SmolLM2-135M-Instruct on plays' dialogues (dotted: before)",
  )
  figure.tight_layout()
  figure.savefig(HERE / "methods.png", dpi=110)


main()
