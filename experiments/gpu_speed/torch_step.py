"""Times a training step of transformers' Llama in PyTorch; prints a JSON line a step.

Needs torch and transformers in an environment of its own; `run.py` starts it.
"""

import argparse
import contextlib
import json
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("--size", choices=["1b", "tiny"], required=True)
parser.add_argument("--rows", type=int, required=True)
parser.add_argument("--length", type=int, required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--eager", action="store_true")
args = parser.parse_args()

# Llama 3.2 1B, and a small one of its kind to try the script.
SHAPES = {
  "1b": {
    "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64,
  },
  "tiny": {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16,
  },
}  # fmt: skip
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
torch.set_float32_matmul_precision("high")
config = LlamaConfig(
  **SHAPES[args.size],
  max_position_embeddings=args.length,
  tie_word_embeddings=True,
  attn_implementation="sdpa",
  use_cache=False,
)
model = LlamaForCausalLM(config).to(device).train()
optimizer = torch.optim.AdamW(
  model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
)
forward = model if args.eager else torch.compile(model)
vocab = config.vocab_size
tokens = torch.randint(0, vocab, (args.rows, args.length + 1), device=device)
flash = (
  sdpa_kernel(SDPBackend.FLASH_ATTENTION)
  if device == "cuda"
  else contextlib.nullcontext()
)


def step() -> float:
  # float32 parameters, bfloat16 products: what jaxlm does.
  with torch.autocast(device, torch.bfloat16):
    logits = forward(input_ids=tokens[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(
      logits.float().reshape(-1, vocab), tokens[:, 1:].reshape(-1)
    )
  loss.backward()
  torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
  optimizer.step()
  optimizer.zero_grad(set_to_none=True)
  return loss.item()


with flash:
  for number in range(args.steps):
    began = time.perf_counter()
    loss = step()
    row = {"step": number, "wall": time.perf_counter() - began, "loss": loss}
    print(json.dumps(row), flush=True)
