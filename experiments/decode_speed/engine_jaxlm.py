"""jaxlm's side: prefill and decode of a GGUF file, one JSON line a figure."""

import argparse
import time

import jax
from common import DECODE, PREFILL, ids_of, report

from jaxlm.decoding.compiles import compiles
from jaxlm.decoding.generate import Generation, Options
from jaxlm.decoding.sampling import Sampling
from jaxlm.decoding.unrolled import unroll
from jaxlm.interop.checkpoint import open_model
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import Precision
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--model", required=True)
  parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
  parser.add_argument("--rows", type=int, required=True)
  args = parser.parse_args()
  opened = open_model(args.model)
  layout = Layout(make_mesh(Mesh(), jax.devices()[:1]))
  decoder = Decoder(opened.model, Precision(compute=args.dtype), layout)
  rows = "one" if args.rows == 1 else "many"
  decoder, params = unroll(decoder, opened.params(decoder), rows)
  prompts, greedy = ids_of(args.rows), Sampling(temperature=0.0)
  options = Options(tokens=DECODE + 1, chunk=PREFILL)
  for turn in ("warm", "timed"):
    with compiles() as seen:
      start = (time.perf_counter(), time.process_time())
      growing = Generation(decoder, params, prompts, greedy, options)
      growing.step()
      middle = (time.perf_counter(), time.process_time())
      rows = growing.finish()
      end = (time.perf_counter(), time.process_time())
    if turn == "timed":
      assert not seen.names, seen.names
      report("prefill", args.rows * PREFILL, start, middle)
      report("decode", args.rows * DECODE, middle, end, rows[0].tokens[:8])


if __name__ == "__main__":
  main()
