"""Times jaxlm's training step of a Llama; prints a JSON line a step. See `run.py`."""

import argparse
import dataclasses
import json
import time

import jax
import numpy as np

from jaxlm.launch import xla
from jaxlm.launch.chips import chip_of
from jaxlm.models import count
from jaxlm.models.attention import work_of
from jaxlm.models.decoder import Decoder
from jaxlm.models.families.llama import llama
from jaxlm.models.spec import LM, Precision
from jaxlm.ops.kernels.choice import choose
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.placement import placer
from jaxlm.sharding.rules import Layout
from jaxlm.training import optimizers
from jaxlm.training.objective import NextToken, Task, next_token
from jaxlm.training.schedules import Constant
from jaxlm.training.state import First, axes_of, create
from jaxlm.training.step import compile_step, make_step


def model_of(size: str) -> LM:
  """Returns the published 1B model, or a small one of its kind to try the script."""
  model = llama("3.2-1b")
  if size == "1b":
    return model
  (block,) = model.pattern
  mixer = dataclasses.replace(block.mixer, heads=4, kv_heads=2, head_dim=16)
  mlp = dataclasses.replace(block.mlp, hidden=128)
  block = dataclasses.replace(block, mixer=mixer, mlp=mlp)
  return dataclasses.replace(model, vocab=512, dim=64, pattern=(block,), repeats=2)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--size", choices=["1b", "tiny"], required=True)
  parser.add_argument("--rows", type=int, required=True)
  parser.add_argument("--length", type=int, required=True)
  parser.add_argument("--steps", type=int, required=True)
  parser.add_argument("--remat", default="none")
  args = parser.parse_args()

  layout = Layout(make_mesh(Mesh(), jax.devices()[:1]))
  model, rows, length = model_of(args.size), args.rows, args.length
  decoder = Decoder(model, Precision(compute="bfloat16"), layout, args.remat)
  optimizer = optimizers.build(
    optimizers.AdamW(lr=Constant(peak=1e-4)), args.steps, axes_of(decoder)
  )
  plan, first_state = create(decoder, optimizer.transform, First(0), ema=False)
  step = make_step(Task(next_token(NextToken(), decoder)), optimizer)

  shape = (rows, length)
  tokens = np.random.default_rng(0).integers(
    0, model.vocab, (rows, length + 1), "int32"
  )
  batch = {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "segments": np.ones(shape, np.int32),
    "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
    "weights": np.ones(shape, np.float32),
  }
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
  chip = chip_of(jax.devices()[0].device_kind)
  compiled = compile_step(step, plan, layout, shapes, xla.options(chip, ()))
  peak = compiled.memory_analysis().peak_memory_in_bytes
  flops = count.training_flops(model, length)
  work = work_of(model.pattern[0].mixer, length, "bfloat16")
  told = {
    "device": jax.devices()[0].device_kind,
    "attention": choose("auto", work, layout).kernel,
    "peak_bytes": peak,
    "flops_a_token": {"causal": flops.causal, "full": flops.full},
    "chip_flops": None if chip is None else chip.flops,
  }
  print(json.dumps(told), flush=True)
  place = placer(layout.sharding("batch", "sequence"), shape)(batch)
  state = first_state()
  for number in range(args.steps):
    began = time.perf_counter()
    state, metrics = compiled(state, place)
    loss = float(metrics["loss"])
    row = {"step": number, "wall": time.perf_counter() - began, "loss": loss}
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
