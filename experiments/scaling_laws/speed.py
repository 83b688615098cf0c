"""Twelve small runs of one shape, done in four ways, each in processes of its own.

    uv run python experiments/scaling_laws/speed.py --rounds=3

commands: a `jaxlm` command each; alone: one process, each a whole run; shared: one
process, one program, run after run; together: all twelve mapped over, in one program.
Nothing is compiled ahead, and the packed text is there for all. Prints a row a way and
round, wall seconds.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from jaxlm import config
from jaxlm.data.corpus import prepare
from jaxlm.runs.sweep import Sweep

HERE = pathlib.Path(__file__)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds; the ways take turns.")
ONE = flags.DEFINE_string("one", None, "A way, done in this process.")
WORKDIR = flags.DEFINE_string("workdir", None, "Its folder.")
SETTINGS = [
  (seed, peak) for seed in range(3) for peak in (6e-3, 1.2e-2, 2.4e-2, 4.8e-2)
]
SWEEPS = {
  "alone": {"how": "alone"},
  "shared": {"most": 1},
  "together": {"most": len(SETTINGS)},
}


def arguments(seed: int, peak: float) -> list[str]:
  return [
    f"seed={seed}", f"optimizer.lr.peak={peak}", "steps=100", "samples.prompts=()",
    "data.held_out=0.01", "data.batch=4", "evaluate_every=100", "checkpoints.every=100",
    f"data.cache={tempfile.gettempdir()}/jaxlm_speed",
  ]  # fmt: skip


def runs():
  base = config.load(f"{HERE.parent}/single.py")
  return tuple(config.override(base, arguments(*each)) for each in SETTINGS)


def do(way: str, workdir: str) -> None:
  if way != "commands":
    Sweep(runs=runs(), **SWEEPS[way]).run(workdir)
    return
  for index, setting in enumerate(SETTINGS):
    words = [f"--config.{word}" for word in arguments(*setting)]
    command = [
      sys.executable, "-m", "jaxlm", f"--config={HERE.parent}/single.py",
      f"--workdir={workdir}/{index}", *words,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main(_) -> None:
  if ONE.value:
    do(ONE.value, WORKDIR.value)
    return
  prepare(runs()[0].data, "unused")
  for number in range(ROUNDS.value):
    for way in ("commands", *SWEEPS):
      folder = tempfile.mkdtemp()
      command = [sys.executable, str(HERE), f"--one={way}", f"--workdir={folder}"]
      began = time.perf_counter()
      subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
      )
      print(
        f"round {number}  {way:<9} {time.perf_counter() - began:7.1f} s", flush=True
      )
      shutil.rmtree(folder)


if __name__ == "__main__":
  app.run(main)
