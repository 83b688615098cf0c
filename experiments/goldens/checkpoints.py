"""Makes the checkpoints of `tests/goldens/checkpoints`: random weights, true logits.

    python experiments/goldens/checkpoints.py

in an environment with torch 2.13 and transformers 5.23. `cases.py` says what is made.
Of each case it writes config.json and the weights as transformers saves them,
golden.npz (tokens, and the logits that transformers computes from them in float32), and
for some config.v4.json, the same config as transformers 4.x published it.

Then it shows that the golden depends on every feature: the logits of the same weights
are computed again with one feature off, or one parameter neutral, and every row of the
table must differ by 1% of the largest logit. Two things cannot: GELU's tanh form is
within 0.0005 of GELU, and the key's part of a fused bias moves all scores of a query
alike where no rotation follows (gpt2, bloom).
"""

import copy
import dataclasses
import json
import pathlib
import re
import shutil
import tempfile
import unittest.mock
import zlib

import numpy as np
import torch
import transformers
from cases import CASES, LENGTH, Case
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.bloom import modeling_bloom

TARGET = pathlib.Path(__file__).parents[2] / "tests/goldens/checkpoints"
LEAST = 0.01
FAINT = {"gelu's tanh form": 1e-5}
NEW_KEYS = {
  "_sliding_window_pattern",
  "dtype",
  "layer_types",
  "rope_parameters",
  "use_bidirectional_attention",
}
QUERY_OR_KEY = re.compile(r"q_proj|k_proj|qkv_proj|c_attn|query_key_value")


def build(config: dict) -> torch.nn.Module:
  made = AutoConfig.for_model(**copy.deepcopy(config))
  return AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
  return model(tokens, use_cache=False).logits


def is_norm(name: str, parameter: torch.Tensor) -> bool:
  return parameter.ndim == 1 and name.endswith("weight")


def drawn(name: str, parameter: torch.Tensor, case: Case, generator) -> torch.Tensor:
  noise = torch.randn(parameter.shape, generator=generator)
  if name.endswith("bias"):
    return 0.3 * noise
  if is_norm(name, parameter):
    mean = 0.3 if re.search(r"q_norm|k_norm", name) else 0.0  # for sharper scores
    return neutral(name, parameter, case) + mean + 0.3 * noise
  if re.search(r"embed|wte|wpe", name):
    return case.embedding * noise
  inputs = parameter.shape[case.config["model_type"] != "gpt2"]
  return (1.5 if QUERY_OR_KEY.search(name) else 1.2) * inputs**-0.5 * noise


def neutral(name: str, parameter: torch.Tensor, case: Case) -> torch.Tensor:
  """Returns what a bias, norm or table of positions is when it does nothing."""
  plain = is_norm(name, parameter) and "gemma" not in case.config["model_type"]
  return torch.ones_like(parameter) if plain else torch.zeros_like(parameter)


@torch.no_grad()
def draw(model: torch.nn.Module, case: Case, generator: torch.Generator) -> None:
  for name, parameter in model.named_parameters():
    parameter.copy_(drawn(name, parameter, case, generator))


def as_v4(config: dict, case: Case) -> dict:
  """Returns the config in the format that transformers 4.x published."""
  gone = NEW_KEYS | set(case.v4_lacks)
  gone |= {key for key in config if key.endswith("_token_id") and config[key] is None}
  kept = {key: value for key, value in config.items() if key not in gone}
  return {**kept, "torch_dtype": config["dtype"], **case.v4}


def write(folder: pathlib.Path, model: torch.nn.Module, case: Case) -> None:
  shutil.rmtree(folder, ignore_errors=True)
  model.save_pretrained(folder, max_shard_size=case.shard)
  (folder / "generation_config.json").unlink(missing_ok=True)
  if case.v4 is not None:
    config = as_v4(json.loads((folder / "config.json").read_text()), case)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config.v4.json").write_text(text)


def goldens(case: Case):
  """Yields (file, length, case) of each golden, with the features that show in it."""
  yield "golden.npz", LENGTH, case
  if case.short:
    short = dataclasses.replace(case, without=case.without_short)
    yield "golden_short.npz", case.short, short


def check_files(folder: pathlib.Path, case: Case) -> None:
  """Computes the goldens again from the files, under each of the configs."""
  for file, _, _ in goldens(case):
    golden = np.load(folder / file)
    tokens = torch.from_numpy(golden["tokens"]).long()
    for config in folder.glob("config*.json"):
      with tempfile.TemporaryDirectory() as copied:
        for weights in folder.glob("*.safetensors*"):
          shutil.copy(weights, copied)
        shutil.copy(config, pathlib.Path(copied, "config.json"))
        model = AutoModelForCausalLM.from_pretrained(
          copied, dtype="float32", attn_implementation="eager"
        )
        found = logits(model.eval(), tokens).numpy()
      assert np.array_equal(found, golden["logits"]), f"{folder.name}: {config.name}"


def spread(model: torch.nn.Module, tokens: torch.Tensor) -> float:
  """Returns the scores' standard deviation, as the last query sees them."""
  with torch.no_grad():
    attentions = model(tokens, use_cache=False, output_attentions=True).attentions
  rows = torch.stack([layer[:, :, -1] for layer in attentions]).flatten(0, 2)
  return torch.stack([row[row > 0].log().std() for row in rows]).mean().item()


def parameters_off(model: torch.nn.Module, case: Case):
  """Yields (kind of parameter, state without one of that kind)."""
  for name, parameter in model.named_parameters():
    if parameter.ndim == 1 or "wpe" in name:
      state = {**model.state_dict(), name: neutral(name, parameter, case)}
      yield re.sub(r".*\.\d+\.", "*.", name), state


def head_retied(model: torch.nn.Module, case: Case) -> dict:
  """Returns a state whose head, if tied, is another matrix, else is the embedding."""
  state = dict(model.state_dict())
  embedding = model.get_input_embeddings().weight
  other = embedding.roll(1, 0) if model.config.tie_word_embeddings else embedding
  return {**state, "lm_head.weight": other}


def slopes_off(heads: int, device) -> torch.Tensor:
  return torch.zeros(heads)


def slopes_of_a_power_of_two(heads: int, device) -> torch.Tensor:
  return 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)


SLOPES = {"alibi": slopes_off, "alibi's odd heads": slopes_of_a_power_of_two}


def ablations(model: torch.nn.Module, case: Case, tokens: torch.Tensor):
  """Yields (feature, logits without it); a kind of parameter comes once a layer."""

  def run(state: dict, **changes) -> torch.Tensor:
    other = build(case.config | changes)
    other.load_state_dict(state)
    return logits(other, tokens)

  state = model.state_dict()
  for feature, changes in case.without.items():
    yield feature, run(state, **changes)
  for kind, changed in parameters_off(model, case):
    yield kind, run(changed)
  tied = "tied head" if model.config.tie_word_embeddings else "untied head"
  yield tied, run(head_retied(model, case), tie_word_embeddings=False)
  if case.config["model_type"] == "bloom":
    for feature, slopes in SLOPES.items():
      with unittest.mock.patch.object(modeling_bloom, "_get_alibi_slopes", slopes):
        yield feature, run(state)


def table(name: str, model: torch.nn.Module, case: Case, tokens: torch.Tensor) -> None:
  """Prints the least difference that each feature makes, and refuses small ones."""
  true = logits(model, tokens)
  largest, least = true.abs().max().item(), {}
  for feature, other in ablations(model, case, tokens):
    change = (other - true).abs().max().item()
    least[feature] = min(change, least.get(feature, change))
  for feature, change in least.items():
    print(
      f"{name:13} {feature:40} {change:9.4f} {largest:7.2f} {change / largest:8.4f}"
    )
    assert change / largest > FAINT.get(feature, LEAST), f"{name}: {feature} is faint"
  print(f"{name:13} {'(scores, standard deviation)':40} {spread(model, tokens):9.4f}")


def make(name: str, case: Case) -> None:
  generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
  model = build(case.config)
  draw(model, case, generator)
  folder = TARGET / name
  write(folder, model, case)
  for file, length, shown in goldens(case):
    shape = (2, length)
    tokens = torch.randint(model.config.vocab_size, shape, generator=generator)
    arrays = {"tokens": tokens.int().numpy(), "logits": logits(model, tokens).numpy()}
    np.savez_compressed(folder / file, **arrays)
    table(name if shown is case else f"{name}/{length}", model, shown, tokens)
  check_files(folder, case)


def main() -> None:
  torch.set_num_threads(1)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  print(f"{'case':13} {'without':40} {'|change|':>9} {'|logit|':>7} {'ratio':>8}")
  for name, case in CASES.items():
    make(name, case)


if __name__ == "__main__":
  main()
