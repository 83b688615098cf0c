"""GGUF files, as llama.cpp reads them: metadata, tensors, a vocabulary.

Read are F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q5_1, Q5_0, Q4_K, Q4_1 and Q4_0; written
F32, F16, BF16 and Q8_0. The `gguf` package does the container and the blocks.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import gguf
import numpy as np
from etils import epath

from jaxlm.errors import InputError
from jaxlm.interop import gguf_keys
from jaxlm.interop.family import Family
from jaxlm.interop.keys import Config
from jaxlm.interop.names import Entry
from jaxlm.interop.registry import by_key, read_model, write_keys
from jaxlm.models.spec import LM

Type = gguf.GGMLQuantizationType
READ = (
  Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q6_K, Type.Q5_K, Type.Q5_1, Type.Q5_0,
  Type.Q4_K, Type.Q4_1, Type.Q4_0,
)  # fmt: skip
WRITE = {
  "float32": Type.F32,
  "float16": Type.F16,
  "bfloat16": Type.BF16,
  "q8_0": Type.Q8_0,
}
FILE_TYPES = {
  "float32": gguf.LlamaFileType.ALL_F32,
  "float16": gguf.LlamaFileType.MOSTLY_F16,
  "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
  "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


class GGUFFile:
  """The tensors and metadata of a file, mapped into memory."""

  def __init__(self, file: epath.Path):
    """Opens a file.

    Raises:
      InputError: not a GGUF file, cut short, or a tensor of a type that is not read.
    """
    self.name = str(file)
    if not file.exists():
      raise InputError(f"{file}: does not exist.")
    try:
      reader = gguf.GGUFReader(self.name)
      self.metadata = {name: value.contents() for name, value in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
      raise InputError(f"{file}: not a whole GGUF file ({error}).") from error
    if self.metadata.get("split.count", 1) > 1:
      raise InputError(
        f"{file}: is one of {self.metadata['split.count']} files that belong together. "
        "Join them first, with llama-gguf-split --merge."
      )
    self._tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, tensor in self._tensors.items():
      if tensor.tensor_type not in READ:
        raise InputError(
          f"{file}: the tensor {name!r} is {tensor.tensor_type.name}; read are "
          f"{', '.join(kind.name for kind in READ)}."
        )
    self.factors = {
      name: self._read(name) for name in gguf_keys.FACTORS if name in self._tensors
    }
    self.shapes = {
      name: tuple(int(n) for n in reversed(tensor.shape))
      for name, tensor in self._tensors.items()
      if name not in self.factors
    }
    if self._head_is_a_copy():
      del self.shapes["output.weight"]

  @property
  def types(self) -> str:
    """How many tensors there are of each type."""
    kinds = [tensor.tensor_type.name for tensor in self._tensors.values()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))

  def _head_is_a_copy(self) -> bool:
    """Says whether an older file has a tied head's table a second time."""
    pair = [self._tensors.get(name) for name in ("output.weight", "token_embd.weight")]
    if any(tensor is None for tensor in pair):
      return False
    head, table = (tensor for tensor in pair if tensor is not None)
    return head.tensor_type == table.tensor_type and np.array_equal(
      head.data, table.data
    )

  def read(self, name: str) -> np.ndarray:
    """See `stream.Source`."""
    return self._read(name)

  def _read(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def read_metadata(file: GGUFFile) -> tuple[Family, LM]:
  """Returns the family and the model that a file describes.

  Raises:
    InputError: an unknown architecture, or a key that is not known.
  """
  name = file.metadata.get("general.architecture")
  family = by_key(str(name), lambda family: family.gguf.architecture, file.name)
  start = f"{name}."
  values = {
    key.removeprefix(start): _shortest(value)
    for key, value in file.metadata.items()
    if key.startswith(start)
  }
  if "token_embd.weight" not in file.shapes:
    raise InputError(f"{file.name}: the tensor 'token_embd.weight' is missing.")
  values |= gguf_keys.told(file.shapes) | file.factors
  config = Config(values, file.name, start)
  return family, read_model(family, family.gguf.keys, config)


def _shortest(value: Any) -> Any:
  """Floats are stored as float32: 1e-5 comes back as 9.99999975e-06."""
  if isinstance(value, list):
    return list(map(_shortest, value))
  return float(str(np.float32(value))) if isinstance(value, float) else value


class Written(NamedTuple):
  """One tensor to be written."""

  name: str
  shape: tuple[int, ...]
  kind: Type


def plan_types(entries: list[Entry], dtype: str) -> list[Written]:
  """Returns each tensor's type: what llama.cpp wants as float32 is that.

  Vectors are float32; a row that is no multiple of a Q8_0 block is float16.
  """
  planned = []
  for entry in entries:
    kind = WRITE[dtype]
    if len(entry.shape) == 1 or entry.name == "position_embd.weight":
      kind = Type.F32
    elif entry.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
      kind = Type.F16
    planned.append(Written(entry.name, entry.shape, kind))
  return planned


def start_writing(
  file: epath.Path, family: Family, model: LM, dtype: str
) -> gguf.GGUFWriter:
  """Returns a writer that knows the model's metadata.

  Raises:
    InputError: the architecture cannot say all of the model.
  """
  values = write_keys(family, family.gguf.keys, model, "GGUF metadata")
  writer = gguf.GGUFWriter(str(file), family.gguf.architecture)
  writer.add_type("model")
  writer.add_file_type(FILE_TYPES[dtype])
  if dtype == "q8_0":
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
  for key, value in values.items():
    if isinstance(value, np.ndarray):
      continue
    _add(writer, f"{family.gguf.architecture}.{key}", value)
  return writer


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
  match value:
    case bool():
      writer.add_bool(key, value)
    case int():
      writer.add_uint32(key, value)
    case float():
      writer.add_float32(key, value)
    case str():
      writer.add_string(key, value)
    case list():
      writer.add_array(key, value)
    case _:
      raise TypeError(f"{key}: {value!r}")


def factors_of(family: Family, model: LM) -> dict[str, np.ndarray]:
  """Returns the tensors of rotary factors that a model's file has besides."""
  values = write_keys(family, family.gguf.keys, model, "GGUF metadata")
  return {name: v for name, v in values.items() if isinstance(v, np.ndarray)}


def write_tensors(
  writer: gguf.GGUFWriter,
  planned: list[Written],
  tensors: Iterator[np.ndarray],
  factors: Mapping[str, np.ndarray],
) -> None:
  """Writes header, metadata and the tensors, one at a time, and closes the file."""
  ends = [Written(name, array.shape, Type.F32) for name, array in factors.items()]
  for one in ends + planned:
    block, size = gguf.GGML_QUANT_SIZES[one.kind]
    nbytes = int(np.prod(one.shape)) // block * size
    dtype = np.dtype(np.float16 if one.kind == Type.F16 else np.float32)
    raw = None if one.kind in (Type.F32, Type.F16) else one.kind
    shape = one.shape
    if raw is not None:
      dtype = np.dtype(np.uint8)
      shape = gguf.quant_shape_to_byte_shape(one.shape, one.kind)
    writer.add_tensor_info(one.name, shape, dtype, nbytes, raw_dtype=raw)
  try:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in factors.values():
      writer.write_tensor_data(array)
    for one, tensor in zip(planned, tensors, strict=True):
      if one.kind == Type.F16 and np.abs(tensor).max() > np.finfo(np.float16).max:
        raise InputError(
          f"{one.name}: has a value that is not finite as float16; nothing is written."
        )
      writer.write_tensor_data(gguf.quants.quantize(tensor, one.kind))
  finally:
    writer.close()
