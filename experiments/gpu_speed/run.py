"""Compares a Llama 1B training step on one GPU with PyTorch's; prints a table.

    uv run --extra gpu python experiments/gpu_speed/run.py --torch PYTHON
    uv run python experiments/gpu_speed/run.py --torch PYTHON --size tiny \
      --length 128 --rows 2 --rounds 1

PYTHON is an interpreter that has torch (of the GPU) and transformers. The programs run
one after the other and the round is repeated; a round's figure is the median of its
steps after the first three, the table's that of the rounds. The second command tries
the script where there is no GPU.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--torch", required=True)
  parser.add_argument("--size", choices=["1b", "tiny"], default="1b")
  parser.add_argument("--rows", type=int, default=4)
  parser.add_argument("--length", type=int, default=4096)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--steps", type=int, default=13)
  parser.add_argument("--remat", default="none")
  args = parser.parse_args()
  shape = [
    f"--{name}={getattr(args, name)}" for name in ("size", "rows", "length", "steps")
  ]
  ours = [sys.executable, str(HERE / "jaxlm_step.py"), *shape, f"--remat={args.remat}"]
  theirs = [args.torch, str(HERE / "torch_step.py"), *shape]
  programs = {
    "jaxlm": ours,
    "PyTorch compiled": theirs,
    "PyTorch eager": [*theirs, "--eager"],
  }
  found: dict[str, list[float]] = {name: [] for name in programs}
  told: dict = {}
  for number in range(args.rounds):
    for name, command in programs.items():
      done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
      rows = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")]
      told = next((row for row in rows if "device" in row), told)
      wall = statistics.median([row["wall"] for row in rows if "wall" in row][3:])
      found[name].append(wall)
      loss = rows[-1]["loss"]
      print(f"round {number}: {name:18} {wall:8.4f} s, loss {loss:.3f}", flush=True)
  print(f"\n{json.dumps(told)}\n")
  print("| program | s a step | tokens/s | MFU, full square | MFU, causal half |")
  print("|---|---|---|---|---|")
  tokens, peak = args.rows * args.length, told["chip_flops"]
  for name, walls in found.items():
    wall = statistics.median(walls)
    shares = [
      f"{told['flops_a_token'][kind] * tokens / wall / peak:.1%}" if peak else "-"
      for kind in ("full", "causal")
    ]
    print(f"| {name} | {wall:.4f} | {tokens / wall:,.0f} | {' | '.join(shares)} |")


if __name__ == "__main__":
  main()
