"""Adapters into PEFT's folders, which PEFT loads with equal outputs."""

import json
from collections.abc import Iterable
from typing import Any

import einops
import numpy as np
from etils import epath
from safetensors.numpy import save_file

from jaxlm import files
from jaxlm.errors import InputError
from jaxlm.interop.family import Family
from jaxlm.interop.names import Entry, Piece
from jaxlm.interop.peft_modules import (
  CONFIG,
  PROMPT,
  WEIGHTS,
  Folder,
  Module,
  Tensors,
  check_plain,
  fused,
  modules_of,
  places,
  prefix_sizes,
)  # fmt: skip
from jaxlm.models.decoder import Decoder
from jaxlm.peft.ia3 import IA3
from jaxlm.peft.lora import LoRA
from jaxlm.peft.soft_prompt import Prefix, Prompt
from jaxlm.trees import first_match, named_leaves

Modules = dict[Piece, Module | Entry]
Written = tuple[dict[str, Any], Tensors]


def write(
  folder: epath.Path, adapters: Folder, decoder: Decoder, family: Family
) -> None:
  """Writes adapters of a model into a new folder.

  Raises:
    InputError: PEFT has no such adapters, or the folder exists.
  """
  spec = adapters.spec
  modules = modules_of(decoder, family)
  leaves = {n: np.asarray(a) for n, a in named_leaves(adapters.trained).items()}
  match spec:
    case LoRA(start="zero"):
      config, tensors = _write_lora(spec, leaves, modules)
    case IA3():
      config, tensors = _write_ia3(leaves, modules)
    case Prompt():
      check_plain(decoder, "adapters")
      config = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
      config |= _virtual(decoder, decoder.spec.dim, spec.length)
      tensors = {PROMPT: leaves["embed/prompt"].astype(np.float32)}
    case Prefix():
      config, tensors = _write_prefix(spec, leaves, decoder)
    case _:
      raise InputError(
        f"adapters: PEFT's folders have no place for {type(spec).__name__}"
        f"{' of this start' if isinstance(spec, LoRA) else ''}; written are LoRA, IA3, "
        "Prompt and Prefix. Export the merged model instead."
      )
  if folder.exists():
    raise InputError(f"{folder}: exists and is not overwritten; give another.")
  folder.mkdir(parents=True)
  about = {
    "base_model_name_or_path": adapters.base,
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
  }
  save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
  files.write_atomic(folder / CONFIG, json.dumps(about | config, indent=2) + "\n")


def _layers(
  leaves: Tensors, modules: Modules, part: str
) -> dict[str, tuple[Module, np.ndarray]]:
  """Returns the tensors of a part by name, each with its module.

  Raises:
    InputError: a matrix that shares its module there.
  """
  found = {}
  for piece, module in modules.items():
    leaf = leaves.get(f"{piece.name}/{part}")
    if leaf is None:
      continue
    if isinstance(module, Entry):
      raise fused(module)
    array = leaf if piece.layer is None else leaf[piece.layer]
    found[module.tensor(part)] = (module, module.written(part, array))
  return found


def _named(chosen: Iterable[Module], modules: Modules) -> list[str]:
  """Returns last names of modules where they tell which, else whole ones."""
  names = [module.name for module in chosen]
  lasts = {name.rpartition(".")[2] for name in names}
  others = {module.name.removesuffix(".weight") for module in modules.values()}
  if any(other.rpartition(".")[2] in lasts for other in others - set(names)):
    return sorted(names)
  return sorted(lasts)


def _alpha(spec: LoRA, name: str) -> float:
  return first_match((*spec.alphas, ("", spec.alpha)), name)


def _write_lora(spec: LoRA, leaves: Tensors, modules: Modules) -> Written:
  tensors, chosen = {}, {}
  for part in ("a", "b", "magnitude"):
    for name, (module, array) in _layers(leaves, modules, part).items():
      tensors[name], chosen[module.name] = array, module
  ranks = {n: spec.rank_of(m.piece.name) for n, m in chosen.items()}
  alphas = {n: _alpha(spec, m.piece.name) for n, m in chosen.items()}
  config = {
    "peft_type": "LORA",
    "r": spec.rank,
    "lora_alpha": spec.alpha,
    "lora_dropout": spec.dropout,
    "target_modules": _named(chosen.values(), modules),
    "rank_pattern": {n: r for n, r in ranks.items() if r != spec.rank},
    "alpha_pattern": {n: a for n, a in alphas.items() if a != spec.alpha},
    "use_rslora": spec.rslora,
    "use_dora": spec.dora,
    "bias": "none",
  }
  return config, tensors


def _write_ia3(leaves: Tensors, modules: Modules) -> Written:
  found = {side: _layers(leaves, modules, side) for side in ("outputs", "inputs")}
  twice = found["outputs"].keys() & found["inputs"].keys()
  if twice:
    raise InputError(f"adapters: PEFT scales inputs or outputs, not both: {twice}.")
  sides = {
    side: [module for module, _ in held.values()] for side, held in found.items()
  }
  config = {
    "peft_type": "IA3",
    "target_modules": _named(sides["outputs"] + sides["inputs"], modules),
    "feedforward_modules": _named(sides["inputs"], modules),
  }
  held = found["outputs"] | found["inputs"]
  return config, {name: array for name, (_, array) in held.items()}


def _virtual(decoder: Decoder, dim: int, length: int) -> dict[str, Any]:
  return {
    "num_virtual_tokens": length,
    "token_dim": dim,
    "num_transformer_submodules": 1,
    "num_attention_heads": decoder.spec.blocks[0].mixer.heads,
    "num_layers": len(decoder.spec.blocks),
  }


def _write_prefix(spec: Prefix, leaves: Tensors, decoder: Decoder) -> Written:
  sizes = prefix_sizes(decoder, "adapters")
  pairs: Any = [[None, None] for _ in range(sizes["L"])]
  for name, layers in places(decoder):
    for side, letter in enumerate("kv"):
      leaf = leaves[f"{name}/prefix_{letter}"]
      for place, layer in enumerate(layers):
        pairs[layer][side] = leaf[place] if name[0] == "l" else leaf
  wide = einops.rearrange(np.array(pairs), "L Z S G K -> S (L Z G K)")
  config = {"peft_type": "PREFIX_TUNING", "prefix_projection": False}
  width = sizes["G"] * sizes["K"]
  config |= _virtual(decoder, width, spec.length)
  config |= {"num_attention_heads": sizes["G"], "encoder_hidden_size": width}
  return config, {PROMPT: np.ascontiguousarray(wide, np.float32)}
