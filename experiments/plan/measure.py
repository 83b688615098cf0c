"""Compiles the plans of RESULT.md, one process after another, and keeps what they say.

Needs the extra `plan`. With names, only those plans.
"""

import json
import pathlib
import resource
import shlex
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
FUSION = "xla_tpu_enable_async_collective_fusion"
# Gathers in pieces beside products, where the compiler takes these options.
OVERLAP = {
  FUSION: "true",
  FUSION + "_fuse_all_gather": "true",
  "xla_tpu_overlap_compute_collective_tc": "true",
  "xla_enable_async_all_gather": "true",
}
BESIDE = "model=MODEL,seq_len=1024,batch=1"
PLANS = {
  "lora_8b_v5p": [f"configs/llama3.py:size=8b,method=lora,{BESIDE}", "v5p:1x1x1"],
  "qlora_8b_v5p": [f"configs/llama3.py:size=8b,method=qlora,{BESIDE}", "v5p:1x1x1"],
  "qlora_70b_v5p": [f"configs/llama3.py:size=70b,method=qlora,{BESIDE}", "v5p:1x1x1"],
  "8b_v5p_4x4x4": ["configs/llama3.py:size=8b,batch=256", "v5p:4x4x4"],
  "8b_v5p_4x4x4_overlap": [
    "configs/llama3.py:size=8b,batch=256",
    "v5p:4x4x4",
    f"--config.compiler={json.dumps([*OVERLAP.items()])}",
  ],
  "8b_v6e_16x16": ["configs/llama3.py:size=8b,batch=1024", "v6e:16x16"],
  "70b_v5p_4x8x8": ["configs/llama3.py:size=70b,batch=1024", "v5p:4x8x8"],
  "1b_v5e_4x4": ["configs/llama3.py:size=1b,batch=32", "v5e:4x4"],
  "quickstart_v5e_2x2": ["configs/quickstart.py", "v5e:2x2"],
}


def measure(name: str) -> str:
  config, target, *overrides = PLANS[name]
  words = [f"--config={config}", f"--plan={target}", *overrides]
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  done = subprocess.run(
    [sys.executable, "-m", "jaxlm", *words],
    cwd=HERE.parents[1],
    capture_output=True,
    text=True,
    check=False,
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  if done.returncode:
    sys.exit(done.stderr)
  seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  command = f"$ uv run --extra plan jaxlm {shlex.join(words)}"
  return f"{command}\n{done.stdout.rstrip()}\nprocess: {seconds:.0f} CPU s"


for name in sys.argv[1:] or PLANS:
  text = measure(name)
  (HERE / f"{name}.txt").write_text(text + "\n")
  print(text, flush=True)
