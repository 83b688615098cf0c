"""llama.cpp's side: the same GGUF file as it is quantized, one row."""

import argparse
import time

import llama_cpp
import numpy as np
from common import DECODE, PREFILL, ids_of, report


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--model", required=True)
  parser.add_argument("--dtype", required=True)
  parser.add_argument("--rows", type=int, choices=[1], required=True)
  args = parser.parse_args()
  model = llama_cpp.Llama(
    args.model, n_ctx=1024, n_batch=512, n_threads=2, n_threads_batch=2, verbose=False
  )
  (ids,) = ids_of(1)
  for turn in ("warm", "timed"):
    model.reset()
    start = (time.perf_counter(), time.process_time())
    model.eval(ids)
    middle = (time.perf_counter(), time.process_time())
    new = []
    for _ in range(DECODE):
      logits = np.ctypeslib.as_array(
        llama_cpp.llama_get_logits(model.ctx), shape=(model.n_vocab(),)
      )
      new.append(int(logits.argmax()))
      model.eval(new[-1:])
    end = (time.perf_counter(), time.process_time())
    if turn == "timed":
      report("prefill", PREFILL, start, middle)
      report("decode", DECODE, middle, end, new[:8])


if __name__ == "__main__":
  main()
