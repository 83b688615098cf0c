"""PEFT's folders of adapters: what both directions share.

    adapter_config.json         what the adapters are, and where
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight, ...

A stack of layers is one array here and a tensor a layer there. Axes are turned as the
family's own table turns its matrices.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import einops
import jax
import numpy as np

from jaxlm.errors import InputError
from jaxlm.interop.family import Family
from jaxlm.interop.names import Entry, Piece, entries
from jaxlm.interop.stream import shapes_of
from jaxlm.models import decoder as decoders
from jaxlm.models.decoder import Decoder
from jaxlm.models.parameters import Matrix, declared
from jaxlm.peft.methods import Adapters
from jaxlm.shapes import PyTree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."
PROMPT = "prompt_embeddings"
Tensors = dict[str, np.ndarray]
SUFFIX = {
  "a": "lora_A.weight",
  "b": "lora_B.weight",
  "magnitude": "lora_magnitude_vector",
}
SUFFIX |= {"inputs": "ia3_l", "outputs": "ia3_l"}


class Module(NamedTuple):
  """A matrix of one layer, as both sides name it."""

  name: str
  """The module's path there, such as model.layers.0.mlp.up_proj."""
  piece: Piece
  """The parameter here, and which layer of it."""
  sides: tuple[str, str, str, str]
  """einops: its axes of inputs there and here, of outputs there and here."""
  sizes: dict[str, int]

  def pattern(self, part: str) -> str:
    """Returns einops's pattern from an array there to one here; R is the rank."""
    ins, ours_in, outs, ours_out = self.sides
    return {
      "a": f"R ({ins}) -> {ours_in} R",
      "b": f"({outs}) R -> R {ours_out}",
      "magnitude": f"({outs}) -> {ours_out}",
      "inputs": f"1 ({ins}) -> {ours_in}",
      "outputs": f"({outs}) 1 -> {ours_out}",
    }[part]

  def tensor(self, part: str) -> str:
    """Returns the name of a part's tensor."""
    return f"{ROOT}{self.name}.{SUFFIX[part]}"

  def read(self, part: str, array: np.ndarray) -> np.ndarray:
    """Returns an array of theirs as ours.

    Raises:
      InputError: it has not the matrix's dims.
    """
    theirs = self.pattern(part).split(" -> ")[0]
    try:
      return self._turned(part, array)
    except einops.EinopsError as error:
      raise InputError(
        f"{self.tensor(part)}: of shape {array.shape}, where the model has {theirs} "
        f"with {self.sizes}. Is it for another model?"
      ) from error

  def _turned(self, part: str, array: np.ndarray) -> np.ndarray:
    return einops.rearrange(array, self.pattern(part), **self._known(part))

  def written(self, part: str, array: np.ndarray) -> np.ndarray:
    """Returns an array of ours as theirs."""
    theirs, ours = self.pattern(part).split(" -> ")
    made = einops.rearrange(array, f"{ours} -> {theirs}", **self._known(part))
    return np.ascontiguousarray(made, np.float32)

  def _known(self, part: str) -> dict[str, int]:
    letters = set(re.findall(r"[A-Z]", self.pattern(part)))
    return {letter: self.sizes[letter] for letter in letters & self.sizes.keys()}


def modules_of(decoder: Decoder, family: Family) -> dict[Piece, Module | Entry]:
  """Returns the module of each matrix and layer; an Entry where several share one."""
  with declared() as matrices:
    boxed = jax.eval_shape(lambda key: decoders.init(decoder, key), jax.random.key(0))
  shapes = shapes_of(decoders.unbox(boxed))
  found: dict[Piece, Module | Entry] = {}
  for entry in entries(family.hf.table, decoder.spec, shapes):
    for piece in entry.pieces:
      if piece.name in matrices:
        alone = len(entry.pieces) == 1 and entry.row.view is None
        found[piece] = _module(entry, matrices[piece.name]) if alone else entry
  return found


def _module(entry: Entry, matrix: Matrix) -> Module:
  before, _, after = entry.row.parts[0].pattern.partition(" -> ")
  letters = (after or before).split()
  ours = (letters[: matrix.inputs], letters[matrix.inputs :])
  groups = [
    (group or letter).split()
    for group, letter in re.findall(r"\(([^)]*)\)|(\w)", before)
  ]
  theirs = [next(g for g in groups if set(g) == set(side)) for side in ours]
  sides = (theirs[0], ours[0], theirs[1], ours[1])
  names = tuple(" ".join(side) for side in sides)
  name = entry.name.removesuffix(".weight")
  return Module(name, entry.pieces[0], names, entry.sizes)  # type: ignore[arg-type]


class Folder(NamedTuple):
  """What a folder of PEFT holds."""

  spec: Adapters
  trained: PyTree
  """float32 arrays on the host, as the method's `init` has them."""
  base: str
  """The model that they are for, as the folder calls it."""


def fused(entry: Entry) -> InputError:
  """Returns the error of a module that holds several matrices."""
  held = ", ".join(piece.name for piece in entry.pieces)
  return InputError(
    f"{entry.name}: one module there and several matrices here ({held}); its adapters "
    "are not read or written. Export the merged model instead."
  )


def check_plain(decoder: Decoder, file: str) -> None:
  """Raises InputError where prompts there and here do not mean the same."""
  if decoder.spec.embed_scale != 1.0:
    raise InputError(f"{file}: prompts of models that scale embeddings are not known.")


def prefix_sizes(decoder: Decoder, file: str) -> dict[str, int]:
  """Returns the layers L, key-value heads G and head dim K of a prefix.

  Raises:
    InputError: they differ from layer to layer.
  """
  heads = {(b.mixer.kv_heads, b.mixer.head_dim) for b in decoder.spec.blocks}
  if len(heads) > 1:
    raise InputError(
      f"{file}: a prefix there has one shape for all layers, not {heads}."
    )
  (kv_heads, head_dim) = heads.pop()
  return {"L": len(decoder.spec.blocks), "G": kv_heads, "K": head_dim}


def places(decoder: Decoder) -> Iterator[tuple[str, list[int]]]:
  """Yields the name of each mixer, and the numbers of its layers in the model."""
  model = decoder.spec
  for i in range(len(model.prefix)):
    yield f"prefix_{i}/mixer", [i]
  step, first = len(model.pattern), len(model.prefix)
  for i in range(step):
    yield f"layers/{i}/mixer", [first + i + step * r for r in range(model.repeats)]
