"""Times jaxlm's training step on the CPU; prints a JSON line a step. See `run.py`."""

import argparse
import json
import time

import jax
import numpy as np

from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import GLU, GQA, LM, Block, Precision
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.placement import placer
from jaxlm.sharding.rules import Layout
from jaxlm.training import optimizers
from jaxlm.training.objective import NextToken, Task, next_token
from jaxlm.training.schedules import Constant
from jaxlm.training.state import First, axes_of, create
from jaxlm.training.step import compile_step, make_step

ROWS, LENGTH, VOCAB = 8, 512, 32_000
BLOCK = Block(mixer=GQA(heads=8, kv_heads=8, head_dim=64), mlp=GLU(hidden=1536))
MODEL = LM(vocab=VOCAB, dim=512, pattern=(BLOCK,), repeats=8)


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--bfloat16", action="store_true")
  parser.add_argument("--steps", type=int, default=5)
  args = parser.parse_args()

  layout = Layout(make_mesh(Mesh()))
  precision = Precision(compute="bfloat16" if args.bfloat16 else "float32")
  decoder = Decoder(MODEL, precision, layout)
  spec = optimizers.AdamW(lr=Constant(peak=1e-4))
  optimizer = optimizers.build(spec, args.steps, axes_of(decoder))
  plan, first_state = create(decoder, optimizer.transform, First(0), ema=False)
  step = make_step(Task(next_token(NextToken(), decoder)), optimizer)

  tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1), np.int32)
  positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
  batch = {
    "tokens": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "segments": np.ones((ROWS, LENGTH), np.int32),
    "positions": positions,
    "weights": np.ones((ROWS, LENGTH), np.float32),
  }
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
  compiled = compile_step(step, plan, layout, shapes)
  place = placer(layout.sharding("batch", "sequence"), (ROWS, LENGTH))
  state = first_state()
  for number in range(args.steps):
    wall, cpu = time.perf_counter(), time.process_time()
    state, metrics = compiled(state, place(batch))
    loss = float(metrics["loss"])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    row = {"step": number, "wall": wall, "cpu": cpu, "loss": loss}
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main()
