"""Converts a checkpoint: reads it, writes it in another form, reads that back."""

import dataclasses
import os
import time
from typing import Any, Literal

import jax
import numpy as np
from etils import epath

from jaxlm import files
from jaxlm.data.tokenizers import Tokenizer, notes
from jaxlm.errors import InputError
from jaxlm.interop import peft_read, peft_write
from jaxlm.interop.adapted import adapted_of
from jaxlm.interop.checkpoint import Exported, Kind, Opened, check_declared, open_model
from jaxlm.interop.peft_modules import Folder
from jaxlm.interop.progress import bar
from jaxlm.interop.registry import by_name, family_of
from jaxlm.models import count
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import Precision
from jaxlm.shapes import PyTree
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout, ShardingRules
from jaxlm.trees import named_leaves

ACCEPTED: dict[Kind, tuple[str, ...]] = {
  "jaxlm": ("float32", "bfloat16"),
  "hf": ("float32", "bfloat16", "float16"),
  "gguf": ("float32", "bfloat16", "float16", "q8_0"),
  "peft": ("float32",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
  """Converts a checkpoint between Hugging Face, GGUF and jaxlm."""

  source: str
  """A Hugging Face folder, a .gguf file, a folder that this wrote, a run's workdir."""
  target: str
  """A folder or a .gguf file that does not exist yet."""
  form: Kind | None = None
  """What to write; None: gguf for a name that ends so, hf from a jaxlm source, else
  jaxlm. peft writes the adapters of a run alone, for PEFT; the others write the merged
  model."""
  dtype: Literal["float32", "bfloat16", "float16", "q8_0"] | None = None
  """Of what is written; None: as in the source, float16 for gguf."""
  family: str | None = None
  """What to call the architecture; None: as the source does, or the first that fits."""
  context: int | None = None
  """Longest sequence, in tokens; None: as the source says. Hugging Face and GGUF need
  one."""
  tokenizer: Literal["with", "without"] = "with"
  """Whether the tokenizer is written too."""
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  """How the devices are arranged."""
  sharding: ShardingRules = dataclasses.field(default_factory=ShardingRules)
  """Which logical axis is split over which mesh axes."""

  def run(self) -> dict[str, Any]:
    """Converts; returns what the report says.

    Raises:
      InputError: the source cannot be read, the target exists or cannot hold it.
    """
    began = time.perf_counter()
    opened = open_model(self.source, "source")
    target = files.absolute(self.target)
    form = self._form(opened)
    dtype = self._dtype(opened, form)
    if target.exists():
      raise InputError(f"target: {target} exists and is not overwritten.")
    if self.context is not None:
      model = dataclasses.replace(opened.model, context=self.context)
      opened = dataclasses.replace(opened, model=model)
    print(f"source: {opened.place} ({opened.kind}, {opened.stored})")
    if form == "peft":
      return self._adapters(opened, target)
    tokenizer = self._tokenizer(opened, form)
    family = by_name(self.family) if self.family else opened.family
    called = Exported(opened.model, family, None, tokenizer).check(form, dtype)
    precision = Precision(params=opened.dtype)
    layout = Layout(make_mesh(self.mesh), self.sharding)
    decoder = Decoder(opened.model, precision, layout)
    with bar("read", opened.model) as tell:
      params = opened.params(decoder, tell)
    check_declared(params, decoder, self.source)
    exported = Exported(opened.model, family, params, tokenizer)
    with bar("write", opened.model) as tell:
      exported.write(target, form, dtype, tell)
    report = self._report(open_model(target), params, form, dtype)
    report["family"] = called
    report["seconds"] = round(time.perf_counter() - began, 1)
    print("\n".join(f"{name}: {value}" for name, value in report.items()))
    return report

  def _adapters(self, opened: Opened, target: epath.Path) -> dict[str, Any]:
    adapted = adapted_of(opened.place) if opened.kind == "jaxlm" else None
    if adapted is None:
      raise InputError(f"source: {self.source} is no run that trained adapters.")
    family = by_name(self.family) if self.family else opened.family
    family = family or family_of(opened.model)
    precision = Precision(params=opened.dtype)
    layout = Layout(make_mesh(self.mesh), self.sharding)
    decoder = Decoder(opened.model, precision, layout)
    spec, trained = adapted.plain(decoder)
    folder = Folder(spec, trained, files.absolute(adapted.initial).as_posix())
    if adapted.run.quantized is not None:
      print(
        f"note: these adapters were trained beside weights in {adapted.run.quantized}; "
        "PEFT will put them beside the base as it is, or as bitsandbytes has it"
      )
    if open_model(adapted.initial).kind != "hf":
      print(
        f"note: PEFT reads its base from a Hugging Face folder, and {folder.base} is "
        f"none; change base_model_name_or_path in {target / peft_read.CONFIG}"
      )
    peft_write.write(target, folder, decoder, family)
    back = named_leaves(peft_read.read(target, decoder, family).trained)
    ours = named_leaves(trained)
    report = {
      "target": f"{target} (peft, {type(spec).__name__})",
      "base": folder.base,
      "leaves": len(ours),
      "parameters": f"{sum(leaf.size for leaf in ours.values()):,}",
      "largest difference after a round trip": max(
        float(np.abs(np.asarray(leaf) - back[name]).max())
        for name, leaf in ours.items()
      ),
    }
    print("\n".join(f"{name}: {value}" for name, value in report.items()))
    return report

  def _form(self, opened: Opened) -> Kind:
    if self.form is not None:
      if (self.form == "gguf") != self.target.endswith(".gguf"):
        raise InputError(
          f"target: {self.target}: a GGUF file, and it alone, ends in .gguf."
        )
      return self.form
    if self.target.endswith(".gguf"):
      return "gguf"
    return "hf" if opened.kind == "jaxlm" else "jaxlm"

  def _dtype(self, opened: Opened, form: Kind) -> str:
    if form == "peft":
      return self.dtype or "float32"
    half = form == "gguf" or (form == "hf" and opened.stored == "F16")
    dtype = self.dtype or ("float16" if half else opened.dtype)
    if dtype not in ACCEPTED[form]:
      accepted = ", ".join(ACCEPTED[form])
      raise InputError(f"dtype: {dtype} cannot be written as {form}; use {accepted}.")
    return dtype

  def _tokenizer(self, opened: Opened, form: Kind) -> Tokenizer | None:
    if self.tokenizer == "without":
      print("tokenizer: left out, as asked")
      return None
    try:
      tokenizer = opened.tokenizer(form)
    except InputError as error:
      raise InputError(
        f"tokenizer: {error} Or convert the weights alone with "
        "--config.tokenizer=without."
      ) from error
    for note in notes(tokenizer):
      print(note)
    return tokenizer

  def _report(
    self, written: Opened, params: PyTree, form: Kind, dtype: str
  ) -> dict[str, Any]:
    with bar("compare", written.model) as tell:
      difference = written.largest_difference(params, tell)
    leaves = jax.tree.leaves(params)
    return {
      "target": f"{written.place} ({form}, {written.stored})",
      "leaves": len(leaves),
      "parameters": f"{count.parameters(written.model).total:,}",
      "bytes": f"{_size(os.fspath(written.place)):,}",
      "dtype": f"{leaves[0].dtype} in memory, {dtype} in the target",
      "largest difference after a round trip": difference,
    }


def _size(place: str) -> int:
  if os.path.isfile(place):
    return os.path.getsize(place)
  return sum(
    os.path.getsize(os.path.join(folder, name))
    for folder, _, names in os.walk(place)
    for name in names
  )
