"""Makes tests/goldens/sampling.npz: logits as transformers' processors leave them.

    python experiments/goldens/sampling.py

in an environment with torch 2.13 and transformers 5.23. The processors of each case
come from `_get_logits_processor`, so that their order is that of `generate`. Of the
rows the first PROMPT tokens are the prompt and the others are new. Transformers has no
presence and frequency penalties. No logit may be near the edge of a filter, or another
order of additions could move it across.
"""

import json
import pathlib

import numpy as np
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

TARGET = pathlib.Path(__file__).parents[2] / "tests/goldens/sampling.npz"
ROWS, VOCAB, PROMPT, NEW = 4, 101, 7, 5
STOPS = (7, 50)
ALLOWED = tuple(range(3, VOCAB, 2))
BIAS = ((4, 3.5), (5, -2.0), (60, 6.0), (61, -0.5))
ALL = {
  "logit_bias": BIAS,
  "repetition_penalty": 1.3,
  "min_tokens": NEW + 1,
  "allowed": ALLOWED,
  "banned": (9, 61),
  "temperature": 0.8,
  "top_k": 30,
  "top_p": 0.95,
  "min_p": 0.02,
  "typical_p": 0.9,
}
CASES = {
  "logit_bias": {"logit_bias": BIAS},
  "repetition_penalty": {"repetition_penalty": 1.3},
  "repetition_reward": {"repetition_penalty": 0.7},
  "min_tokens, too few": {"min_tokens": NEW + 1},
  "min_tokens, enough": {"min_tokens": NEW},
  "allowed": {"allowed": ALLOWED},
  "banned": {"banned": (0, 9, 100)},
  "temperature": {"temperature": 0.6},
  "temperature, hot": {"temperature": 2.5},
  "top_k": {"top_k": 12},
  "top_k of one": {"top_k": 1},
  "top_k of all": {"top_k": 5000},
  "top_p": {"top_p": 0.9},
  "top_p, small": {"top_p": 0.05},
  "min_p": {"min_p": 0.1},
  "min_p of one": {"min_p": 1.0},
  "typical_p": {"typical_p": 0.6},
  "typical_p, hot": {"typical_p": 0.3, "temperature": 2.0},
  "top_k, top_p": {"top_k": 12, "top_p": 0.8},
  "top_p, min_p": {"top_p": 0.9, "min_p": 0.15},
  "top_p, typical_p": {"top_p": 0.9, "typical_p": 0.5},
  "temperature, top_k, top_p, min_p, typical_p": {
    "temperature": 1.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "typical_p": 0.7,
  },
  "logit_bias, repetition_penalty": {"logit_bias": BIAS, "repetition_penalty": 1.8},
  "all": ALL,
}


def config(fields: dict) -> GenerationConfig:
  # What generate leaves out is what a Sampling leaves out, top_k among it.
  same = {"temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"}
  given = {"top_k": 0} | {name: fields[name] for name in same & fields.keys()}
  made = GenerationConfig(
    do_sample=True, num_beams=1, eos_token_id=list(STOPS), **given
  )
  made._eos_token_tensor = torch.tensor(STOPS)
  if bias := fields.get("logit_bias"):
    made.sequence_bias = {(token,): value for token, value in bias}
  if banned := fields.get("banned"):
    made.suppress_tokens = list(banned)
  made.min_new_tokens = fields.get("min_tokens")
  return made


def processed(fields: dict, tokens: torch.Tensor, logits: torch.Tensor) -> np.ndarray:
  shape = {"n_embd": 8, "n_head": 1, "n_layer": 1, "n_positions": 16}
  ends = {"bos_token_id": 0, "eos_token_id": 0}
  model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **shape, **ends))
  allowed = fields.get("allowed")
  processors = model._get_logits_processor(
    config(fields),
    input_ids_seq_length=PROMPT,
    prefix_allowed_tokens_fn=(lambda *_: list(allowed)) if allowed else None,
  )
  print(", ".join(type(one).__name__ for one in processors))
  return processors(tokens, logits.clone()).numpy()


def main():
  random = np.random.default_rng(5)
  logits = (random.normal(size=(ROWS, VOCAB)) * 2.5).astype(np.float32)
  # Likely tokens are repeated, so that penalties change what the filters keep.
  likely = np.argsort(-logits, axis=1)[:, :10]
  tokens = random.permuted(np.concatenate([likely, likely[:, :2]], axis=1), axis=1)
  assert tokens.shape[1] == PROMPT + NEW
  found = {
    name: processed(fields, torch.from_numpy(tokens), torch.from_numpy(logits))
    for name, fields in CASES.items()
  }
  about = {"prompt": PROMPT, "stops": STOPS, "cases": CASES}
  np.savez_compressed(
    TARGET, logits=logits, tokens=tokens, about=json.dumps(about), **found
  )
  for name, case in found.items():
    print(f"{name}: {np.isfinite(case).sum(1).tolist()} left")


if __name__ == "__main__":
  main()
