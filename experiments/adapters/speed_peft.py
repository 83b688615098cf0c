"""Times LoRA steps of PEFT on the CPU; prints a JSON line a step. See `speed.py`.

With --make it only writes its first adapters and the tokens, which both sides read.
"""

import argparse
import json
import pathlib
import resource
import time

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ROWS, LENGTH = 4, 256


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("model")
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--make", action="store_true")
  parser.add_argument("--steps", type=int, default=6)
  args = parser.parse_args()
  torch.manual_seed(0)
  torch.set_num_threads(2)
  net = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
  if args.make:
    config = LoraConfig(
      r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    get_peft_model(net, config).save_pretrained(args.folder)
    draw = np.random.default_rng(0)
    ids = draw.integers(0, net.config.vocab_size, (ROWS, LENGTH + 1))
    np.save(args.folder / "tokens.npy", ids)
    return
  net = PeftModel.from_pretrained(net, args.folder, is_trainable=True).train()
  ids = torch.tensor(np.load(args.folder / "tokens.npy"))
  weights = [p for p in net.parameters() if p.requires_grad]
  optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
  for _ in range(args.steps):
    wall, cpu = time.perf_counter(), time.process_time()
    logits = net(input_ids=ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"wall": wall, "cpu": cpu, "loss": loss.item()}), flush=True)
  peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print(json.dumps({"peak": peak}))


main()
