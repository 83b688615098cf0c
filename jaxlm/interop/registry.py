"""The families that are known, and which of them a model belongs to."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxlm.config import differences
from jaxlm.errors import InputError, nearest
from jaxlm.interop.families.bloom import BLOOM
from jaxlm.interop.families.gemma import GEMMA, GEMMA2, GEMMA3
from jaxlm.interop.families.gpt2 import GPT2
from jaxlm.interop.families.llama import LLAMA, MISTRAL
from jaxlm.interop.families.olmo2 import OLMO2
from jaxlm.interop.families.phi3 import PHI3
from jaxlm.interop.families.qwen import QWEN2, QWEN3
from jaxlm.interop.family import Family
from jaxlm.interop.gguf_keys import TOLD
from jaxlm.interop.keys import Config, Key, read_shape, write_shape
from jaxlm.models.families.shape import shape_of
from jaxlm.models.spec import LM

FAMILIES = (
  LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, OLMO2, GPT2, BLOOM,
)  # fmt: skip


def by_name(name: str) -> Family:
  """Returns the family of a name.

  Raises:
    InputError: there is none.
  """
  for family in FAMILIES:
    if family.name == name:
      return family
  names = [family.name for family in FAMILIES]
  raise InputError(
    f"family: no {name!r}; known are {', '.join(names)}.{nearest(name, names)}"
  )


def by_key(name: str, key: Callable[[Family], str], file: str) -> Family:
  """Returns the first family whose `key` is `name`, as a file calls its architecture.

  Raises:
    InputError: there is none.
  """
  for family in FAMILIES:
    if key(family) == name:
      return family
  known = list(dict.fromkeys(map(key, FAMILIES)))
  raise InputError(
    f"{file}: the architecture {name!r} is not known; known are {', '.join(known)}."
    f"{nearest(str(name), known)}"
  )


def family_of(model: LM) -> Family:
  """Returns the first family whose config.json can say all of a model.

  Raises:
    InputError: there is none; the message has what the nearest would change.
  """
  lost = {}
  for family in FAMILIES:
    changed = _lost(family, family.hf.keys, model)
    if not changed:
      return family
    lost[family.name] = changed
  name = min(lost, key=lambda name: len(lost[name]))
  raise InputError(
    "model: no known family can say all of it, so no other program could read it. "
    f"Nearest is {name}, which would change {'; '.join(lost[name])}."
  )


def read_model(family: Family, keys: tuple[Key, ...], config: Config) -> LM:
  """Returns the model that a config describes.

  Raises:
    InputError: a key is missing, unknown, or has a value that is not built.
  """
  shape = read_shape(keys, config)
  try:
    return family.build(shape)
  except InputError as error:
    raise InputError(f"{config.file}: {error}") from error


def write_keys(family: Family, keys: tuple[Key, ...], model: LM, what: str) -> Any:
  """Returns the config of a model, in the words of one format.

  Raises:
    InputError: read back, the config would describe another model.
  """
  changed = _lost(family, keys, model)
  if changed:
    raise InputError(
      f"model: {what} of the family {family.name} cannot say all of it. Read back it "
      f"would change {'; '.join(changed)}."
    )
  return write_shape(keys, shape_of(model))


def _lost(family: Family, keys: tuple[Key, ...], model: LM) -> list[str]:
  """Returns what would differ if the model's config were written and read back."""
  shape = shape_of(model)
  known = {name: getattr(shape, name) for name in TOLD}
  try:
    values = write_shape(keys, shape)
    values |= known if keys is family.gguf.keys else {}
    back = read_model(family, keys, Config(values, family.name))
    return changes(rounded(model), rounded(back))
  except InputError as error:
    return [str(error)]


def changes(model: LM, other: LM) -> list[str]:
  """Returns what differs between two models, however their blocks are arranged.

  What differs in the same way in several blocks is named once.
  """
  found = differences(_flat(model), _flat(other))
  return list(dict.fromkeys(re.sub(r"^pattern\.\d+", "block", line) for line in found))


def _flat(model: LM) -> LM:
  return dataclasses.replace(model, prefix=(), pattern=model.blocks, repeats=1)


def rounded(spec: Any) -> Any:
  """Returns a spec with its floats as float32 tells them apart."""
  if isinstance(spec, float):
    return float(str(np.float32(spec)))
  if isinstance(spec, tuple):
    return tuple(map(rounded, spec))
  if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
    names = [field.name for field in dataclasses.fields(spec)]
    return dataclasses.replace(spec, **{n: rounded(vars(spec)[n]) for n in names})
  return spec
