"""Hugging Face folders: config.json and safetensors, in one file or sharded."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxlm import files
from jaxlm.errors import InputError
from jaxlm.interop.family import Family
from jaxlm.interop.keys import Config
from jaxlm.interop.names import Entry
from jaxlm.interop.registry import by_key, read_model, write_keys
from jaxlm.models.spec import LM

CONFIG, GENERATION = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
FLOATS = ("F64", "F32", "F16", "BF16")


def read_config(folder: epath.Path) -> tuple[Family, LM]:
  """Returns the family and the model that a folder's config.json describes.

  Raises:
    InputError: no such file, not JSON, an unknown architecture, or a key that is not
      known or has a value that is not built.
  """
  file = folder / CONFIG
  values = _json(file)
  if "quantization_config" in values:
    raise InputError(f"{file}: quantization_config: quantized weights are not read.")
  name = values.get("model_type")
  family = by_key(str(name), lambda family: family.hf.model_type, str(file))
  wanted = [family.hf.architecture]
  if (values.get("architectures") or wanted) != wanted:
    raise InputError(
      f"{file}: architectures={values['architectures']}: of the type {name} only "
      f"{family.hf.architecture}, a language model, is read."
    )
  return family, read_model(family, family.hf.keys, Config(values, str(file)))


def _json(file: epath.Path) -> dict[str, Any]:
  try:
    values = json.loads(file.read_text())
  except FileNotFoundError as error:
    raise InputError(f"{file}: does not exist; a model's folder has one.") from error
  except ValueError as error:
    raise InputError(f"{file}: not JSON ({error}).") from error
  if not isinstance(values, dict):
    raise InputError(f"{file}: not a JSON object.")
  return values


def write_config(family: Family, model: LM, dtype: str, ids: Mapping[str, Any]) -> str:
  """Returns the text of config.json; `ids` are the tokenizer's, such as bos_token_id.

  Raises:
    InputError: the family cannot say all of the model.
  """
  values = write_keys(family, family.hf.keys, model, CONFIG)
  about = {
    "architectures": [family.hf.architecture],
    "model_type": family.hf.model_type,
    "torch_dtype": dtype,
  }
  return json.dumps(about | values | dict(ids), indent=2) + "\n"


class Safetensors:
  """The tensors of a folder; a file is open only while one of them is read."""

  def __init__(self, folder: epath.Path, family: Family):
    """Reads the headers of all files.

    Raises:
      InputError: a file is missing, cut short, or holds something other than floats.
    """
    self.name = str(folder)
    self._place: dict[str, tuple[epath.Path, str]] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: set[str] = set()
    prefix = family.hf.prefix
    for file, names in _files(folder).items():
      with _opened(file) as opened:
        held = list(opened.keys())
        _check_index(file, names, held)
        for name in held:
          if re.search(family.hf.buffers, name):
            continue
          part = opened.get_slice(name)
          if part.get_dtype() not in FLOATS:
            raise InputError(
              f"{file}: the tensor {name!r} is {part.get_dtype()}; read are "
              f"{', '.join(FLOATS)}."
            )
          self._place[name] = (file, name)
          self.shapes[name] = tuple(part.get_shape())
          self.dtypes.add(part.get_dtype())
    if not any(name.startswith(prefix) for name in self.shapes):
      whole = {row.theirs for row in family.hf.table}
      names = {name: name if name in whole else prefix + name for name in self.shapes}
      self._place = {names[name]: place for name, place in self._place.items()}
      self.shapes = {names[name]: shape for name, shape in self.shapes.items()}

  def read(self, name: str) -> np.ndarray:
    """See `stream.Source`."""
    file, theirs = self._place[name]
    with _opened(file) as opened:
      return opened.get_tensor(theirs)


def _check_index(file: epath.Path, named: list[str] | None, held: list[str]) -> None:
  for name in set(held) ^ set(held if named is None else named):
    lacks = "is not in it" if name not in held else "is in it and not in the index"
    raise InputError(f"{file}: by {INDEX}, the tensor {name!r} {lacks}.")


def _files(folder: epath.Path) -> dict[epath.Path, list[str] | None]:
  """Returns each file of a folder with the tensors that are looked for in it."""
  if not (folder / INDEX).exists():
    if not (folder / SINGLE).exists():
      raise InputError(
        f"{folder}: has neither {SINGLE} nor {INDEX}; weights in other files, such as "
        "pytorch_model.bin, are not read."
      )
    return {folder / SINGLE: None}
  places: dict[epath.Path, list[str] | None] = {}
  told = _json(folder / INDEX).get("weight_map")
  if not isinstance(told, dict) or not all(isinstance(f, str) for f in told.values()):
    raise InputError(f"{folder / INDEX}: has no weight_map, from tensors to files.")
  for name, file in told.items():
    names = places.setdefault(folder / file, [])
    assert names is not None
    names.append(name)
  for file in places:
    if not file.exists():
      raise InputError(f"{file}: is missing, and {INDEX} names it.")
  return places


def _opened(file: epath.Path) -> Any:
  try:
    return safe_open(str(file), framework="numpy")
  except (SafetensorError, OSError) as error:
    raise InputError(
      f"{file}: not a whole safetensors file ({error}). Fetch it again."
    ) from error


def drop_tied_head(source: Safetensors, head: str, table: str) -> None:
  """Forgets a stored copy of a tied head.

  Raises:
    InputError: it is no copy.
  """
  if head not in source.shapes or table not in source.shapes:
    return
  if not np.array_equal(source.read(head), source.read(table)):
    raise InputError(
      f"{source.name}: the tensor {head!r} differs from {table!r}, and "
      "tie_word_embeddings says that they are one."
    )
  del source.shapes[head]


def shards(entries: list[Entry], itemsize: int) -> Iterator[tuple[str, list[Entry]]]:
  """Yields (file name, its tensors), files up to 5 GB, in the entries' order."""
  groups: list[list[Entry]] = [[]]
  size = 0
  for entry in entries:
    more = int(np.prod(entry.shape)) * itemsize
    if groups[-1] and size + more > SHARD_BYTES:
      groups.append([])
      size = 0
    groups[-1].append(entry)
    size += more
  for number, group in enumerate(groups, 1):
    name = f"model-{number:05}-of-{len(groups):05}.safetensors"
    yield (name if len(groups) > 1 else SINGLE), group


def write_tensors(file: epath.Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes one safetensors file, in the form that transformers takes for its own."""
  save_file(tensors, str(file), metadata={"format": "pt"})
  os.chmod(file, 0o644)  # the library makes files that their owner alone can read


def write_index(folder: epath.Path, places: Mapping[str, str], size: int) -> None:
  """Writes the index of a sharded checkpoint: {tensor: file} and all bytes."""
  index = {"metadata": {"total_size": size}, "weight_map": dict(places)}
  files.write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")
