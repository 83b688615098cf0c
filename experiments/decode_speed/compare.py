"""Runs the engines by turns on one GGUF file and prints medians.

    python experiments/decode_speed/compare.py --model FILE.gguf --rounds 3 \
      --jaxlm .venv/bin/python --torch OTHER_ENVIRONMENT/bin/python
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess

HERE = pathlib.Path(__file__).parent
CASES = [
  ("jaxlm", "float32", 1), ("transformers", "float32", 1), ("llama_cpp", "Q4_1", 1),
  ("jaxlm", "float32", 8), ("transformers", "float32", 8),
  ("jaxlm", "bfloat16", 1), ("transformers", "bfloat16", 1),
  ("jaxlm", "bfloat16", 8), ("transformers", "bfloat16", 8),
]  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--model", required=True)
  parser.add_argument("--jaxlm", required=True)
  parser.add_argument("--torch", required=True)
  parser.add_argument("--rounds", type=int, default=3)
  args = parser.parse_args()
  found: dict[tuple, list[dict]] = {}
  for turn in range(args.rounds):
    for engine, dtype, rows in CASES:
      python = args.jaxlm if engine == "jaxlm" else args.torch
      command = [
        python, str(HERE / f"engine_{engine}.py"), "--model", args.model,
        "--dtype", dtype, "--rows", str(rows),
      ]  # fmt: skip
      env = os.environ | {
        "JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2",
      }  # fmt: skip
      done = subprocess.run(
        command, capture_output=True, text=True, env=env, check=True
      )
      for line in done.stdout.splitlines():
        if line.startswith("{"):
          row = json.loads(line)
          found.setdefault((engine, dtype, rows, row["what"]), []).append(row)
          load = os.getloadavg()[0]
          print(turn, engine, dtype, rows, line, f"load {load:.1f}", flush=True)
  print(
    "\n| engine | dtype | rows | what | tokens / CPU s | tokens / s |\n"
    + "|---" * 6
    + "|"
  )
  for key, rows in found.items():
    cpu, wall = (statistics.median(row[of] for row in rows) for of in ("cpu", "wall"))
    print("|", " | ".join(map(str, key)), f"| {cpu:.1f} | {wall:.1f} |")


if __name__ == "__main__":
  main()
