"""Tunes SmolLM2-135M by one method after another: same data, same steps.

    uv run python experiments/adapters/compare.py FOLDER [METHOD ...]

FOLDER, which holds the model, gets a workdir and a log for each; rows go to
results.jsonl beside this file. Each
method is a process of its own, whose peak memory is the row's. With --time instead of
training to the end, each makes a few steps and tells the median seconds of one.
"""

import json
import pathlib
import re
import resource
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
STEPS, TIMED = 40, 8
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHARED = f"model={{model}},seq_len=256,batch=4,steps={STEPS}"
METHODS = {
  "full": f"configs/sft.py:{SHARED},lr=1e-4",
  **{
    name: f"configs/lora.py:method={name},{SHARED}"
    for name in ("lora", "rslora", "dora", "qlora", "ia3", "prefix", "prompt")
  },
}


def one(method: str, folder: str, model: str, *, timed: bool) -> None:
  """Runs in a process of its own; prints a row."""
  import jax

  from jaxlm import config

  run = config.load(str(ROOT / METHODS[method].format(model=model)))
  words = ["samples.prompts=[]", "mesh.fsdp=1"]
  if timed:
    words += [f"steps={TIMED}", "log_every=1", "data.held_out=0"]
  else:
    words += [f"evaluate_every={STEPS}", f"checkpoints.every={STEPS}"]
  run = config.override(run, words)
  result = run.run(pathlib.Path(folder) / (f"{method}-timed" if timed else method))
  row: dict = {"method": method, "jax": jax.__version__}
  if timed:
    seconds = [r["seconds"] for r in result.rows if "seconds" in r]
    row["seconds_a_step"] = round(statistics.median(seconds[2:]), 3)
    row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
  else:
    held_out = [r for r in result.rows if "held_out/nll" in r]
    for name in ("nll", "bits_per_byte"):
      row[name] = [round(r[f"held_out/{name}"], 4) for r in held_out]
    place = result.workdir / "checkpoints" / f"{STEPS:08d}"
    files = pathlib.Path(place).rglob("*")
    row["checkpoint_mb"] = sum(f.stat().st_size for f in files if f.is_file()) / 1e6
  print("ROW " + json.dumps(row))


def told(log: pathlib.Path) -> dict:
  """Returns the row of a log, with what it says of the parameters that train."""
  text = log.read_text()
  (row,) = [line[4:] for line in text.splitlines() if line[:4] == "ROW "]
  found = re.search(r"trains ([\d,]+) parameters .*\(([\d.]+)% of", text)
  whole = re.search(r"^model: ([\d,]+) parameters", text, re.MULTILINE)
  assert whole is not None
  count, share = (whole[1], "100") if found is None else found.groups()
  trained = {"trained": int(count.replace(",", "")), "share": float(share)}
  return json.loads(row) | trained


def main(words: list[str]) -> None:
  timed = "--time" in words
  folder, *methods = [word for word in words if word != "--time"]
  model = str(pathlib.Path(folder) / MODEL)
  pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  for method in methods or METHODS:
    log = pathlib.Path(folder) / f"{method}{'-timed' if timed else ''}.log"
    command = [sys.executable, __file__, "--one", method, folder, model]
    with log.open("w") as file:
      flags = ["--time"] if timed else []
      done = subprocess.run(command + flags, stdout=file, stderr=file, check=False)
    if done.returncode:
      sys.exit(f"{method}: see {log}")
    row = json.dumps(told(log))
    print(row, flush=True)
    with (HERE / "results.jsonl").open("a") as file:
      file.write(row + "\n")


if sys.argv[1] == "--one":
  one(*sys.argv[2:5], timed="--time" in sys.argv)
else:
  main(sys.argv[1:])
