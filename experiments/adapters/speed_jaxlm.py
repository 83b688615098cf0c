"""Times jaxlm's LoRA steps on the CPU; prints a JSON line a step. See `speed.py`."""

import argparse
import json
import pathlib
import resource
import time

import jax
import numpy as np
from etils import epath

from jaxlm.data.packing import examples
from jaxlm.data.sources import Jsonl
from jaxlm.data.spec import Data, Weighted
from jaxlm.data.tokenizers import Bytes
from jaxlm.interop import peft_read
from jaxlm.interop.checkpoint import open_model
from jaxlm.peft.lora import LoRA
from jaxlm.runs.assembled import assemble, compiled
from jaxlm.runs.fields import Placement
from jaxlm.runs.train import Train
from jaxlm.sharding.mesh import make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.training.objective import BASE
from jaxlm.training.optimizers import AdamW
from jaxlm.training.schedules import Constant


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("model")
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--steps", type=int, default=6)
  args = parser.parse_args()
  tokens = np.load(args.folder / "tokens.npy").astype(np.int32)
  rows, length = tokens.shape[0], tokens.shape[1] - 1
  opened = open_model(args.model)
  run = Train(
    model=opened.model,
    initial=args.model,
    adapters=LoRA(rank=8, alpha=16.0),
    data=Data(
      sources=(Weighted(source=Jsonl(path="unused")),),
      tokenizer=Bytes(),
      seq_len=length,
      batch=rows,
    ),
    optimizer=AdamW(lr=Constant(peak=1e-3), weight_decay=0.0, b2=0.999, clip=None),
    steps=args.steps,
  )
  layout = Layout(make_mesh(run.mesh), run.sharding)
  parts = assemble(run, layout)
  assert parts.base is not None
  assert opened.family is not None
  weights = opened.params(parts.decoder)
  state = parts.first_state(weights)
  found = peft_read.read(epath.Path(args.folder), parts.decoder, opened.family)
  first = jax.device_put(found.trained, parts.plan.shardings.params)
  state = state._replace(params=first)
  frozen = {BASE: parts.base.freeze(weights)}
  segments = np.ones_like(tokens)
  ones = {"weights": np.ones(tokens.shape, np.float32)}
  place = Placement.of(layout, run.data).beside(frozen)
  batch = place.put(examples(tokens, segments, ones))
  step = compiled(parts, {})
  for _ in range(args.steps):
    wall, cpu = time.perf_counter(), time.process_time()
    state, metrics = step(state, batch)
    loss = float(metrics["loss"])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"wall": wall, "cpu": cpu, "loss": loss}), flush=True)
  peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print(json.dumps({"peak": peak}))


main()
