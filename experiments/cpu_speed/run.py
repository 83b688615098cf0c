"""Compares training steps on the CPU, alternating; prints the table of RESULT.md.

    uv run python experiments/cpu_speed/run.py --torch PYTHON [--rounds 5]

PYTHON is an interpreter that has torch and transformers. Every program runs for
itself, one after the other, and the round is repeated, so that a slow minute of the
machine hits all of them. A round's figure is the median of its steps after the first
two, and the table shows the median over rounds.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
TERAFLOP = 1.125
"""Of a step by MaxText's count: 6 N a token without the embedding, and attention."""


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--torch", required=True)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=6)
  args = parser.parse_args()
  ours = [sys.executable, str(HERE / "jaxlm_step.py")]
  theirs = [args.torch, str(HERE / "torch_step.py")]
  programs = {
    "jaxlm float32": ours,
    "PyTorch eager float32": theirs,
    "PyTorch compiled float32": [*theirs, "--compile"],
    "jaxlm bfloat16": [*ours, "--bfloat16"],
    "PyTorch eager bfloat16": [*theirs, "--bfloat16"],
    "PyTorch compiled bfloat16": [*theirs, "--bfloat16", "--compile"],
  }
  for python, name in ((sys.executable, "jax"), (args.torch, "torch")):
    subprocess.run([python, str(HERE / "peak.py"), name], check=True)
  rows: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
  for number in range(args.rounds):
    for name, command in programs.items():
      command = [*command, "--steps", str(args.steps)]
      lines = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True
      ).stdout.splitlines()
      steps = [json.loads(line) for line in lines if line.startswith("{")][2:]
      wall, cpu = (statistics.median(s[key] for s in steps) for key in ("wall", "cpu"))
      rows[name].append((wall, cpu))
      print(f"round {number}: {name:26} wall {wall:6.2f}  cpu {cpu:6.2f}", flush=True)
  print("\n| program | wall s a step | CPU s a step | GFLOP/s, wall |")
  print("|---|---|---|---|")
  for name, values in rows.items():
    wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
    print(f"| {name} | {wall:.2f} | {cpu:.2f} | {1000 * TERAFLOP / wall:.0f} |")


if __name__ == "__main__":
  main()
