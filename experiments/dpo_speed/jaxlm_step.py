"""Times jaxlm's DPO step on the CPU; prints a JSON line a step. See `run.py`."""

import argparse
import json
import pathlib
import resource
import time

import jax
import numpy as np

from jaxlm.data.conversations import Preferences
from jaxlm.data.packing import examples
from jaxlm.data.spec import Data, Weighted
from jaxlm.data.tokenizers import Bytes
from jaxlm.interop.checkpoint import open_model
from jaxlm.posttrain import objectives
from jaxlm.posttrain.objectives import Preference
from jaxlm.runs import initial
from jaxlm.runs.assembled import assemble, compiled
from jaxlm.runs.fields import Placement
from jaxlm.runs.train import Train
from jaxlm.sharding.mesh import make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.training.optimizers import AdamW
from jaxlm.training.schedules import Constant

END = 1


def rows(pairs: list[dict[str, list[int]]]) -> dict[str, np.ndarray]:
  """Returns a pair a row: chosen, then rejected, each after its prompt."""
  tokens, weights = [], []
  for pair in pairs:
    both = [pair["prompt"] + pair[name] + [END] for name in ("chosen", "rejected")]
    prompt, length = len(pair["prompt"]), len(both[0])
    # A row has one token more than inputs: the last target of its last sequence.
    tokens.append([*both[0], *both[1], 0])
    spoken = np.arange(length) >= prompt
    weights.append([*spoken, *spoken, False])
  segments = np.repeat([[1] * length + [2] * length + [0]], len(pairs), axis=0)
  return examples(
    np.array(tokens, np.int32), segments, {"weights": np.array(weights, np.float32)}
  )


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--steps", type=int, default=6)
  args = parser.parse_args()
  host = rows(json.loads((args.folder / "pairs.json").read_text()))
  count, length = host["tokens"].shape
  opened = open_model(args.folder)
  run = Train(
    model=opened.model,
    objective=Preference(),
    data=Data(
      sources=(Weighted(source=Preferences(path="unused")),),
      tokenizer=Bytes(),
      seq_len=length,
      batch=count,
      per_row=1,
    ),
    optimizer=AdamW(lr=Constant(peak=1e-6), weight_decay=0.0),
    steps=args.steps,
  )
  layout = Layout(make_mesh(run.mesh), run.sharding)
  parts = assemble(run, layout)
  state = parts.first_state(initial.load(opened, parts.decoder, 0))
  place = Placement.of(layout, run.data)
  host["values"] = np.zeros((count, length), np.float32)
  batch = place.put({n: a for n, a in host.items() if n in parts.batch})
  score = jax.jit(lambda p, b: objectives.reference(parts.decoder, 128, p, b))
  batch |= score(state.params, batch)
  step = compiled(parts, {})
  for _ in range(args.steps):
    wall, cpu = time.perf_counter(), time.process_time()
    state, metrics = step(state, batch)
    loss = float(metrics["loss"])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"wall": wall, "cpu": cpu, "loss": loss}), flush=True)
  peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print(json.dumps({"peak": peak}))


if __name__ == "__main__":
  main()
