"""Compares DPO steps with TRL's DPOTrainer on the CPU, alternating.

    uv run python experiments/dpo_speed/run.py --trl PYTHON [--rounds 3] [--steps 6]

PYTHON is an interpreter that has torch, transformers, datasets and trl. Both train the
same tiny Llama from the same weights on the same four pairs again and again, so their
losses must go the same way. Each program runs for itself, one after the other, and the
round is repeated. A round's figure is the median of its steps after the first two, and
the table shows the median over rounds (least and most). RESULT.md holds what came out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Round(NamedTuple):
  """What a program did: medians in seconds, bytes, and its losses."""

  wall: float
  cpu: float
  peak: float
  losses: list[float]


def measured(command: list[str]) -> Round:
  threads = {"OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
  lines = subprocess.run(
    command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads
  ).stdout.splitlines()
  told = [json.loads(line) for line in lines if line.startswith('{"')]
  (peak,) = [row["peak"] for row in told if "peak" in row]
  steps = [row for row in told if "wall" in row]
  wall, cpu = (statistics.median(s[key] for s in steps[2:]) for key in ("wall", "cpu"))
  return Round(wall, cpu, peak, [float(s["loss"]) for s in steps])


def shown(values: list[float]) -> str:
  low, high = min(values), max(values)
  return f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--trl", required=True)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=6)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    theirs = [args.trl, str(HERE / "trl_step.py"), folder]
    subprocess.run([*theirs, "--make"], check=True)
    programs = {
      "jaxlm": [sys.executable, str(HERE / "jaxlm_step.py"), folder],
      "TRL, reference ahead": [*theirs, "--ahead"],
      "TRL, reference model beside": theirs,
    }
    rounds: dict[str, list[Round]] = {name: [] for name in programs}
    for number in range(args.rounds):
      for name, command in programs.items():
        found = measured([*command, "--steps", str(args.steps)])
        rounds[name].append(found)
        losses = " ".join(f"{loss:.4f}" for loss in found.losses)
        print(
          f"round {number}: {name:28} wall {found.wall:6.2f}  cpu {found.cpu:6.2f}  "
          f"peak {found.peak / 1e9:.2f} GB  losses {losses}",
          flush=True,
        )
  print("\n| program | wall s a step | CPU s a step | peak GB of the process |")
  print("|---|---|---|---|")
  for name, found in rounds.items():
    wall, cpu = shown([r.wall for r in found]), shown([r.cpu for r in found])
    print(f"| {name} | {wall} | {cpu} | {shown([r.peak / 1e9 for r in found])} |")


if __name__ == "__main__":
  main()
