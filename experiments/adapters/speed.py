"""Compares LoRA steps with PEFT's on the CPU, alternating.

    uv run python experiments/adapters/speed.py --peft PYTHON --model MODEL

PYTHON is an interpreter that has torch, transformers and peft; MODEL a Hugging Face
folder. Both train rank 8 on all matrices of the layers, from the same weights and first
adapters, on the same four rows of 256 tokens, float32, AdamW, two threads: so their
losses must go the same way. Each program runs for itself, one after the other, and the
round is repeated. A round's figure is the median of its steps after the first two.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
Row = dict[str, float]


def measured(command: list[str]) -> tuple[Row, list[float]]:
  threads = {"OMP_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
  lines = subprocess.run(
    command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads
  ).stdout.splitlines()
  told = [json.loads(line) for line in lines if line.startswith('{"')]
  steps = [row for row in told if "wall" in row]
  found = {k: statistics.median(s[k] for s in steps[2:]) for k in ("wall", "cpu")}
  return found | told[-1], [s["loss"] for s in steps]


def shown(values: list[float]) -> str:
  low, high = min(values), max(values)
  return f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--peft", required=True)
  parser.add_argument("--model", required=True)
  parser.add_argument("--rounds", type=int, default=3)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    theirs = [args.peft, str(HERE / "speed_peft.py"), args.model, folder]
    subprocess.run([*theirs, "--make"], check=True)
    ours = [sys.executable, str(HERE / "speed_jaxlm.py"), args.model, folder]
    rounds: dict[str, list[Row]] = {"jaxlm": [], "PEFT": []}
    for number in range(args.rounds):
      for name, command in (("jaxlm", ours), ("PEFT", theirs)):
        found, losses = measured(command)
        rounds[name].append(found)
        print(
          f"round {number}: {name:6} wall {found['wall']:6.2f}  "
          f"cpu {found['cpu']:6.2f}  peak {found['peak'] / 1e9:.2f} GB  losses "
          + " ".join(f"{loss:.4f}" for loss in losses),
          flush=True,
        )
  print("\n| program | wall s a step | CPU s a step | peak GB of the process |")
  print("|---|---|---|---|")
  for name, found in rounds.items():
    wall, cpu = (shown([row[key] for row in found]) for key in ("wall", "cpu"))
    print(f"| {name} | {wall} | {cpu} | {shown([r['peak'] / 1e9 for r in found])} |")


main()
