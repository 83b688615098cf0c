"""Times a training step of transformers' Llama in PyTorch; prints a JSON line a step.

Needs torch and transformers in an environment of its own; `run.py` starts it.
"""

import argparse
import json
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--compile", action="store_true")
parser.add_argument("--bfloat16", action="store_true")
parser.add_argument("--steps", type=int, default=5)
args = parser.parse_args()

torch.set_num_threads(2)
torch.manual_seed(0)
model = LlamaForCausalLM(
  LlamaConfig(
    vocab_size=32_000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    attn_implementation="sdpa",
    use_cache=False,
  )
)
model.train()
optimizer = torch.optim.AdamW(
  model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
)
forward = torch.compile(model) if args.compile else model
tokens = torch.randint(0, 32_000, (8, 513))


def step() -> float:
  with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
    logits = forward(input_ids=tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(
      logits.float().reshape(-1, 32_000), tokens[:, 1:].reshape(-1)
    )
  loss.backward()
  torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
  optimizer.step()
  optimizer.zero_grad(set_to_none=True)
  return loss.item()


for number in range(args.steps):
  wall, cpu = time.perf_counter(), time.process_time()
  loss = step()
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  row = {"step": number, "wall": wall, "cpu": cpu, "loss": loss}
  print(json.dumps(row), flush=True)
