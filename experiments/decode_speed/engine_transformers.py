"""transformers' side: `generate` on the same GGUF file; see RESULT.md for versions."""

import argparse
import os
import time

import torch
import transformers
from common import DECODE, PREFILL, ids_of, report


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--model", required=True)
  parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
  parser.add_argument("--rows", type=int, required=True)
  args = parser.parse_args()
  torch.set_num_threads(2)
  folder, name = os.path.split(os.path.realpath(args.model))
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, gguf_file=name, dtype=getattr(torch, args.dtype)
  ).eval()
  ids = torch.tensor(ids_of(args.rows))
  model.generation_config.eos_token_id = None
  model.generation_config.pad_token_id = 0

  def run(tokens: int):
    start = (time.perf_counter(), time.process_time())
    with torch.inference_mode():
      out = model.generate(
        ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
      )
    return start, (time.perf_counter(), time.process_time()), out

  run(4)
  start, middle, _ = run(1)
  begun, end, out = run(DECODE + 1)
  report("prefill", args.rows * PREFILL, start, middle)
  # Of the long run, what the short one of the same prompt took is the prefill.
  rest = tuple(b + (m - s) for b, m, s in zip(begun, middle, start, strict=True))
  new = out[0, PREFILL : PREFILL + 8].tolist()
  report("decode", args.rows * DECODE, rest, end, new)


if __name__ == "__main__":
  main()
