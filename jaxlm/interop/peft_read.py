"""Adapters out of PEFT's folders: LoRA, rsLoRA, DoRA, IA3, prompts and prefixes."""

import json
import math
import re
from typing import Any

import einops
import numpy as np
import xxhash
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file

from jaxlm.errors import InputError
from jaxlm.interop.family import Family
from jaxlm.interop.names import Entry, Piece
from jaxlm.interop.peft_modules import (
  CONFIG,
  PROMPT,
  ROOT,
  SUFFIX,
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
from jaxlm.peft.methods import Adapters
from jaxlm.peft.soft_prompt import Prefix, Prompt
from jaxlm.peft.targets import put
from jaxlm.shapes import PyTree
from jaxlm.training.checkpoints import BLOCK

Modules = dict[Piece, Module | Entry]
Layers = dict[int | None, tuple[Module, np.ndarray]]
Held = dict[str, Layers]
STARTS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
"""First values that leave the base as it is."""
PLAIN = {
  "modules_to_save": (None, []),
  "bias": (None, "none"),
  "lora_bias": (None, False),
  "alora_invocation_tokens": (None,),
  "layer_replication": (None,),
  "trainable_token_indices": (None,),
  "target_parameters": (None, []),
  "use_qalora": (None, False),
  "prefix_projection": (None, False),
  "num_transformer_submodules": (None, 1),
}
"""Fields that may only say these."""


class _Given:
  """A folder's config and tensors, which readers take out."""

  def __init__(self, folder: epath.Path, decoder: Decoder, family: Family):
    self.config, self.file = _config(folder), str(folder / CONFIG)
    if not (folder / WEIGHTS).exists():
      raise InputError(f"{folder / WEIGHTS}: does not exist; adapters are in it.")
    try:
      loaded = load_file(folder / WEIGHTS)
    except SafetensorError as error:
      raise InputError(f"{folder / WEIGHTS}: cannot be read ({error}).") from error
    self.tensors: Tensors = {n: a.astype(np.float32) for n, a in loaded.items()}
    self.decoder, self.modules = decoder, modules_of(decoder, family)


def is_one(folder: epath.Path) -> bool:
  """Says whether a folder holds PEFT's adapters."""
  return (folder / CONFIG).exists()


def base_of(folder: epath.Path) -> str:
  """Returns what the folder calls the model that its adapters are for."""
  return str(_config(folder).get("base_model_name_or_path") or "")


def kind_of(folder: epath.Path) -> str:
  """Returns what the folder calls its kind of adapters."""
  return str(_config(folder).get("peft_type"))


def identity(folder: epath.Path, base: epath.Path) -> str:
  """Returns a hash of a folder of adapters and of the files of its base."""
  state = xxhash.xxh3_128()
  places = [folder / CONFIG, folder / WEIGHTS]
  places += sorted(base.iterdir()) if base.is_dir() else [base]
  for place in places:
    if place.is_dir():
      continue
    with place.open("rb") as file:
      while block := file.read(BLOCK):
        state.update(block)
  return state.hexdigest()


def _config(folder: epath.Path) -> dict[str, Any]:
  try:
    found = json.loads((folder / CONFIG).read_text())
  except ValueError as error:
    raise InputError(f"{folder / CONFIG}: not JSON ({error}).") from error
  if not isinstance(found, dict):
    raise InputError(f"{folder / CONFIG}: not a JSON object.")
  return found


def read(folder: epath.Path, decoder: Decoder, family: Family) -> Folder:
  """Reads adapters for a model.

  Raises:
    InputError: a kind or a field that is not read, or tensors that do not suit.
  """
  given = _Given(folder, decoder, family)
  config, file = given.config, given.file
  kinds = {
    "LORA": _read_lora,
    "IA3": _read_ia3,
    "PREFIX_TUNING": _read_prefix,
    "PROMPT_TUNING": _read_prompt,
  }
  kind = config.get("peft_type")
  if kind not in kinds:
    raise InputError(f"{file}: peft_type={kind!r}; read are {', '.join(kinds)}.")
  for key, plain in PLAIN.items():
    if config.get(key) not in plain:
      raise InputError(
        f"{file}: {key}={config[key]!r} is not read; only {plain[-1]!r} is."
      )
  spec, trained = kinds[kind](given)
  if given.tensors:
    raise InputError(
      f"{folder / WEIGHTS}: the tensor {next(iter(given.tensors))!r} is not known for "
      "this model."
    )
  return Folder(spec, trained, str(config.get("base_model_name_or_path")))


def _stacked(given: _Given, part: str, *, flat: bool | None = None) -> Held:
  """Takes the tensors of a part out; returns them by parameter and layer.

  With `flat` only those whose first dim is 1, or is not.
  """
  found: Held = {}
  for piece, module in given.modules.items():
    if isinstance(module, Entry):
      name = module.name.removesuffix(".weight")
      if any(key.startswith(f"{ROOT}{name}.") for key in given.tensors):
        raise fused(module)
      continue
    array = given.tensors.get(module.tensor(part))
    if array is None or (flat is not None and flat != (array.shape[0] == 1)):
      continue
    del given.tensors[module.tensor(part)]
    layers = found.setdefault(piece.name, {})
    layers[piece.layer] = (module, module.read(part, array))
  return found


def _joined(given: _Given, layers: Layers, name: str) -> np.ndarray:
  """Returns the array of a parameter, its layers stacked.

  Raises:
    InputError: only some layers are there, or their ranks differ.
  """
  if None in layers:
    return layers[None][1]
  wanted = range(given.decoder.spec.repeats)
  missing = [i for i in wanted if i not in layers]
  shapes = {array.shape for _, array in layers.values()}
  if missing or len(shapes) > 1:
    raise InputError(
      f"{given.file}: {name} stands for {len(wanted)} layers, which must all have "
      f"adapters of one rank; missing are {missing}, shapes {sorted(shapes)}."
    )
  return np.stack([layers[i][1] for i in wanted])


def _read_lora(given: _Given) -> tuple[Adapters, PyTree]:
  config, file = given.config, given.file
  start = config.get("init_lora_weights", True)
  if start not in STARTS:
    raise InputError(
      f"{file}: init_lora_weights={start!r}: such adapters may be for a base that PEFT "
      "has changed; read are "
      f"{', '.join(map(str, STARTS[1:]))}. Save them converted "
      "(path_initial_model_for_weight_conversion)."
    )
  dora = bool(config.get("use_dora"))
  parts = ("a", "b", "magnitude") if dora else ("a", "b")
  found = {part: _stacked(given, part) for part in parts}
  names, trained = list(found["a"]), {}
  if not names:
    raise InputError(f"{file}: no tensor of LoRA is for this model.")
  ranks, alphas = [], []
  for name in names:
    for part in parts:
      if name not in found[part]:
        raise InputError(f"{file}: {name} has no tensor {SUFFIX[part]}.")
      put(trained, f"{name}/{part}", _joined(given, found[part][name], name))
    layers = list(found["a"][name].values())
    ranks.append(layers[0][1].shape[-1])
    told = {_alpha(config, module.name) for module, _ in layers}
    if len(told) > 1:
      raise InputError(f"{file}: alpha_pattern: {name} has layers of alphas {told}.")
    alphas.append(told.pop())
  places = [f"^{re.escape(name)}$" for name in names]
  spec = LoRA(
    targets=tuple(places),
    rank=ranks[0],
    alpha=alphas[0],
    ranks=tuple((p, r) for p, r in zip(places, ranks, strict=True) if r != ranks[0]),
    alphas=tuple((p, a) for p, a in zip(places, alphas, strict=True) if a != alphas[0]),
    rslora=bool(config.get("use_rslora")),
    dora=dora,
    dropout=float(config.get("lora_dropout", 0.0)),
  )
  return spec, trained


def _alpha(config: dict[str, Any], module: str) -> float:
  for pattern, alpha in (config.get("alpha_pattern") or {}).items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      return float(alpha)
  return float(config.get("lora_alpha") or 8.0)


def _read_ia3(given: _Given) -> tuple[Adapters, PyTree]:
  chosen, trained = {}, {}
  for side in ("inputs", "outputs"):
    found = _stacked(given, side, flat=side == "inputs")
    for name, layers in found.items():
      put(trained, f"{name}/{side}", _joined(given, layers, name))
    chosen[side] = tuple(f"^{re.escape(name)}$" for name in found)
  if not trained:
    raise InputError(f"{given.file}: no tensor of IA3 is for this model.")
  return IA3(targets=chosen["outputs"], inputs=chosen["inputs"]), trained


def _virtual(given: _Given) -> np.ndarray:
  """Takes out what stands for virtual tokens."""
  if PROMPT not in given.tensors:
    raise InputError(f"{given.file}: the tensor {PROMPT} is missing beside it.")
  return given.tensors.pop(PROMPT)


def _read_prompt(given: _Given) -> tuple[Adapters, PyTree]:
  rows_SD, dim = _virtual(given), given.decoder.spec.dim
  check_plain(given.decoder, given.file)
  if rows_SD.shape[-1] != dim:
    raise InputError(
      f"{given.file}: prompts of {rows_SD.shape[-1]} dims for a model of {dim}."
    )
  return Prompt(length=len(rows_SD)), {"embed": {"prompt": rows_SD}}


def _read_prefix(given: _Given) -> tuple[Adapters, PyTree]:
  wide, trained = _virtual(given), {}
  sizes = prefix_sizes(given.decoder, given.file)
  needed = 2 * math.prod(sizes.values())
  if wide.shape[1] != needed:
    raise InputError(
      f"{given.file}: {wide.shape[1]} numbers a virtual token; the model needs "
      f"{needed}."
    )
  pairs = einops.rearrange(wide, "S (L Z G K) -> L Z S G K", Z=2, **sizes)
  for name, layers in places(given.decoder):
    for side, letter in enumerate("kv"):
      stack = pairs[layers, side]
      stacked = name.startswith("layers/")
      put(trained, f"{name}/prefix_{letter}", stack if stacked else stack[0])
  return Prefix(length=len(wide)), trained
