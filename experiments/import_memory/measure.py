"""Measures the memory that loading a model onto eight virtual devices needs.

    uv run python experiments/import_memory/measure.py --size tiny-1.1b --dtype bfloat16

Writes a Hugging Face folder of that size with random weights, in one file and tensor
by tensor, into a temporary folder. Then loads it in two processes of their own onto CPU
devices, fsdp 4 x tensor 2: as jaxlm does, and with all tensors read first. Prints a
line of JSON for each with bytes and seconds; `peak` is the process's largest resident
memory less what was resident before loading.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

DEVICES = 8
KEPT = {"float32": "F32", "bfloat16": "BF16"}


def write(folder: pathlib.Path, size: str, dtype: str) -> None:
  """Writes config.json and model.safetensors, one tensor at a time."""
  from jaxlm.interop import hf
  from jaxlm.interop.names import entries
  from jaxlm.interop.registry import family_of

  model, plan = planned(size, dtype)
  family = family_of(model)
  (folder / hf.CONFIG).write_text(hf.write_config(family, model, dtype, {}))
  wanted = entries(family.hf.table, model, plan)
  width, end, header = np.dtype(dtype).itemsize, 0, {}
  for entry in wanted:
    start, end = end, end + width * int(np.prod(entry.shape))
    header[entry.name] = {
      "dtype": KEPT[dtype],
      "shape": entry.shape,
      "data_offsets": (start, end),
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  rng = np.random.default_rng(0)
  with (folder / hf.SINGLE).open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in wanted:
      weights = rng.random(entry.shape, np.float32) - np.float32(0.5)
      file.write(weights.astype(dtype).tobytes())


def planned(size: str, dtype: str) -> Any:
  """Returns a model and {parameter: shape}."""
  model, made = decoder(size, dtype)
  from jaxlm.interop import stream

  return model, stream.shapes_of(stream.Plan.of(made).shapes)


def decoder(size: str, dtype: str) -> Any:
  """Returns a model and its decoder on eight devices."""
  from jaxlm.models.decoder import Decoder
  from jaxlm.models.families.llama import llama
  from jaxlm.models.spec import Precision
  from jaxlm.sharding.mesh import Mesh, make_mesh
  from jaxlm.sharding.rules import Layout

  model: Any = llama(size)  # type: ignore[arg-type]
  layout = Layout(make_mesh(Mesh(fsdp=4, tensor=2)))
  return model, Decoder(model, Precision(params=dtype), layout)  # type: ignore[arg-type]


class Whole:
  """All tensors of a source, read at once."""

  def __init__(self, source: Any):
    self.name, self.shapes = source.name, source.shapes
    self._tensors = {name: source.read(name) for name in source.shapes}

  def read(self, name: str) -> np.ndarray:
    return self._tensors[name]


def resident() -> int:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE")


def largest_resident() -> int:
  """Not getrusage's figure: that remembers the process which this one came from."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  (line,) = (line for line in lines if line.startswith("VmHWM:"))
  return int(line.split()[1]) * 1024


def load(folder: pathlib.Path, size: str, dtype: str, way: str) -> dict[str, Any]:
  """Loads a folder and returns the figures."""
  import jax

  from jaxlm.interop.checkpoint import open_model

  opened = open_model(str(folder))
  model, made = decoder(size, dtype)
  assert opened.model == model
  assert jax.device_count() == DEVICES
  jax.block_until_ready(jax.device_put(np.ones(8), jax.devices()[0]))
  before, start = resident(), time.monotonic()
  if way == "whole":
    opened = dataclasses.replace(opened, source=Whole(opened.source))
  params = opened.params(made)
  seconds = time.monotonic() - start
  peak = largest_resident()
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
  return {
    "way": way,
    "params": sum(sizes),
    "leaf": max(sizes),
    "peak": peak - before,
    "before": before,
    "after": resident() - before,
    "seconds": round(seconds, 2),
  }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--size", default="tiny-1.1b")
  parser.add_argument("--dtype", default="bfloat16", choices=list(KEPT))
  parser.add_argument("--step", choices=["write", "streamed", "whole"])
  parser.add_argument("--folder", type=pathlib.Path)
  args = parser.parse_args()
  told = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES)}
  if args.step is None:
    with tempfile.TemporaryDirectory() as folder:
      for step in ("write", "streamed", "whole"):
        again = [sys.executable, *sys.argv, "--step", step, "--folder", folder]
        subprocess.run(again, check=True, env=os.environ | told)
    return
  if args.step == "write":
    write(args.folder, args.size, args.dtype)
    return
  print(json.dumps(load(args.folder, args.size, args.dtype, args.step)), flush=True)


if __name__ == "__main__":
  main()
