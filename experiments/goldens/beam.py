"""Makes tests/goldens/beam.json: what transformers' beam search finds.

    python experiments/goldens/beam.py

in an environment with torch 2.13 and transformers 5.23. The model is the golden
checkpoint `llama`, in float32 on a CPU. Each prompt is searched alone. One beam is
greedy decoding there, which gives no score. The stops are
tokens that its beams meet often, so that hypotheses end early, late and at the limit.
The script prints how often each choice changes the result: none may do so never.
"""

import itertools
import json
import pathlib

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

GOLDENS = pathlib.Path(__file__).parents[2] / "tests/goldens"
TOKENS, PROMPTS = 10, 5
STOPS = {"none": (), "one": (16,), "three": (16, 42, 59)}
CHOICES = {
  "width": (1, 2, 3, 4),
  "length_penalty": (0.0, 1.0, 2.0),
  "early_stopping": (False, True, "never"),
  "stops": tuple(STOPS),
}


def prompts() -> list[list[int]]:
  random = np.random.default_rng(8)
  return [random.integers(3, 61, 2 + 2 * row).tolist() for row in range(PROMPTS)]


@torch.no_grad()
def search(model, prompt: list[int], case: dict) -> list[dict]:
  stops = list(STOPS[case["stops"]])
  config = GenerationConfig(
    num_beams=case["width"],
    num_return_sequences=case["width"],
    length_penalty=case["length_penalty"],
    early_stopping=case["early_stopping"],
    max_new_tokens=TOKENS,
    do_sample=False,
    eos_token_id=stops or None,
    pad_token_id=0,
    return_dict_in_generate=True,
    output_scores=True,
  )
  model.generation_config.eos_token_id = None
  ids = torch.tensor([prompt])
  found = model.generate(
    ids, attention_mask=torch.ones_like(ids), generation_config=config
  )
  rows = []
  for row, line in enumerate(found.sequences[:, len(prompt) :].tolist()):
    end = next((i for i, token in enumerate(line) if token in stops), len(line))
    score = None
    if case["width"] > 1:
      score = round(found.sequences_scores[row].item(), 6)
    rows.append({"tokens": line[:end], "stop": end < len(line), "score": score})
  return rows


def changed(results: dict, name: str) -> int:
  """Returns in how many cases another value of this choice gives another result."""
  at, count = list(CHOICES).index(name), 0
  for case, found in results.items():
    others = [(*case[:at], value, *case[at + 1 :]) for value in CHOICES[name]]
    count += any(results[other][0] != found[0] for other in others)
  return count


def main():
  model = AutoModelForCausalLM.from_pretrained(
    GOLDENS / "checkpoints/llama", dtype="float32", attn_implementation="eager"
  ).eval()
  results = {}
  for values in itertools.product(*CHOICES.values()):
    case = dict(zip(CHOICES, values, strict=True))
    results[values] = [search(model, prompt, case) for prompt in prompts()]
  for name in CHOICES:
    print(name, changed(results, name), "of", len(results))
    assert changed(results, name)
  cases = [
    dict(zip(CHOICES, values, strict=True)) | {"found": found}
    for values, found in results.items()
  ]
  ends = [row["stop"] for case in cases for rows in case["found"] for row in rows]
  print("stopped", sum(ends), "of", len(ends))
  text = {"tokens": TOKENS, "stops": STOPS, "prompts": prompts(), "cases": cases}
  (GOLDENS / "beam.json").write_text(json.dumps(text, separators=(",", ":")) + "\n")


if __name__ == "__main__":
  main()
