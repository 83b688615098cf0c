"""What a run takes from a pretrained model: its weights and its tokenizer."""

import dataclasses

from etils import epath

from jaxlm import files
from jaxlm.data.pretrained import Pretrained
from jaxlm.data.spec import Data
from jaxlm.errors import InputError
from jaxlm.interop.checkpoint import Opened
from jaxlm.interop.progress import bar
from jaxlm.interop.registry import changes
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import LM
from jaxlm.shapes import PyTree


def describe(opened: Opened, model: LM) -> str:
  """Returns what the run starts from, and what it changes in the architecture."""
  lines = [f"starting from {opened.place} ({opened.kind}, {opened.stored})"]
  lines += [f"  changed from it: {line}" for line in changes(opened.model, model)]
  if opened.family is not None:
    lines[0] += f", family {opened.family.name}"
  return "\n".join(lines)


def with_tokenizer(data: Data, opened: Opened, workdir: epath.Path) -> Data:
  """Returns the data with a tokenizer folder where a file holds the vocabulary.

  Raises:
    InputError: the file's vocabulary is of a kind that is not read.
  """
  spec = data.tokenizer
  if opened.kind != "gguf" or not isinstance(spec, Pretrained):
    return data
  if files.path(spec.path) != opened.place:
    return data
  folder = workdir / "pretrained"
  folder.mkdir(parents=True, exist_ok=True)
  opened.tokenizer().save(folder)
  return dataclasses.replace(
    data, tokenizer=dataclasses.replace(spec, path=str(folder))
  )


def load(opened: Opened, decoder: Decoder, seed: int) -> PyTree:
  """Returns the weights that a run starts from.

  Raises:
    InputError: a parameter differs in name or shape.
  """
  try:
    with bar("load", decoder.spec) as tell:
      return opened.started(decoder, seed, tell)
  except InputError as error:
    raise InputError(f"initial: {error}") from error
