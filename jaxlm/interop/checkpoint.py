"""One way to open a pretrained model, whatever it is kept in, and one to write it.

    opened = open_model("SmolLM2-135M-Instruct.Q4_1.gguf")
    decoder = Decoder(opened.model, Precision(), layout)
    params, tokenizer = opened.params(decoder), opened.tokenizer()

A Hugging Face folder, a GGUF file, jaxlm's own folder of a model, or a run's workdir.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from etils import epath

from jaxlm import files
from jaxlm.data import sentencepieces, tokenizers
from jaxlm.errors import InputError
from jaxlm.interop import gguf, hf, own, peft_read, stream, vocabulary
from jaxlm.interop.adapted import Adapted, adapted_of
from jaxlm.interop.family import Family
from jaxlm.interop.names import Entry, Table, check_tensors, entries
from jaxlm.interop.registry import by_name, family_of
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import LM
from jaxlm.peft import methods
from jaxlm.peft.targets import merge
from jaxlm.shapes import PyTree
from jaxlm.sharding.rules import Layout
from jaxlm.training.fingerprint import weights_hash

Kind = Literal["jaxlm", "hf", "gguf", "peft"]
Tell = Callable[[int], Any]


def _nothing(done: int) -> None:
  pass


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model that can be loaded."""

  place: epath.Path
  kind: Kind
  family: Family | None
  model: LM
  dtype: Literal["float32", "bfloat16"]
  """The narrowest dtype that loses nothing."""
  source: hf.Safetensors | gguf.GGUFFile | None
  """The tensors, where they are not Orbax's."""
  stored: str
  """What the file says of its dtypes."""
  base: "Opened | None" = None
  """Of a folder of PEFT's adapters: the model that they are for."""

  def params(self, decoder: Decoder, tell: Tell = _nothing) -> PyTree:
    """Returns the parameters in the decoder's shardings and dtype.

    Args:
      decoder: of this model.
      tell: hears the elements of each tensor that is done.

    Raises:
      InputError: a tensor is missing, unknown, or has another shape.
    """
    if self.base is not None:
      return self._beside(self.base, decoder, tell)
    plan = stream.Plan.of(decoder)
    if self.source is None:
      adapted = adapted_of(self.place)
      if adapted is not None:
        return self._adapted(adapted, decoder, tell)
      read = own.restore(self.place, plan)
      tell(sum(leaf.size for leaf in jax.tree.leaves(read)))
      return read
    wanted = self._entries(plan)
    return stream.load(plan, self.source, wanted, tell)

  def _beside(self, base: "Opened", decoder: Decoder, tell: Tell) -> PyTree:
    assert self.family is not None
    found = peft_read.read(self.place, decoder, self.family)
    weights = dataclasses.replace(base, model=decoder.spec).params(decoder, tell)
    attach = methods.build(found.spec, (), decoder).attach

    def together(weights: PyTree, trained: PyTree) -> PyTree:
      merged = merge(attach(weights, trained, None))
      return jax.tree.map(lambda x: x.astype(decoder.precision.params), merged)

    return jax.jit(together)(weights, found.trained)

  def _adapted(self, adapted: Adapted, decoder: Decoder, tell: Tell) -> PyTree:
    run = adapted.run
    precision = dataclasses.replace(decoder.precision, params=run.precision.params)
    where = f"initial, in {self.place / 'config.json'}"
    first = open_model(adapted.initial, where)
    weights = first.started(decoder.clone(precision=precision), run.seed, tell)
    identity = first.identity(decoder.layout, weights)
    return adapted.merged(decoder, weights, identity)

  def identity(self, layout: Layout, weights: PyTree) -> str:
    """Returns a hash of what was read as these weights.

    Of a model that was put together, it is of its parts: sums and products round
    otherwise on another mesh. A head that was drawn does not count.
    """
    adapted = adapted_of(self.place) if self.kind == "jaxlm" else None
    if adapted is not None:
      return adapted.identity
    if self.base is not None:
      return peft_read.identity(self.place, self.base.place)
    if self.model.scores is None:
      weights = {name: leaf for name, leaf in weights.items() if name != "score"}
    return weights_hash(layout, weights)

  def started(self, decoder: Decoder, seed: int, tell: Tell = _nothing) -> PyTree:
    """Returns the weights, for a model that may differ in what has no parameters.

    A reward model made of a language model draws its head from the seed.

    Raises:
      InputError: a parameter differs in name or shape.
    """
    model = decoder.spec
    if model.scores == self.model.scores:
      params = dataclasses.replace(self, model=model).params(decoder, tell)
      check_declared(params, decoder, str(self.place))
      return params
    if self.model.scores is not None or model.scores is None:
      raise InputError(
        f"{self.place} has {self.model.scores} scores and the model {model.scores}. A "
        "reward model starts from a language model, or from one of as many scores."
      )
    plain = decoder.clone(spec=dataclasses.replace(model, scores=None))
    params = dataclasses.replace(self, model=plain.spec).params(plain, tell)
    check_declared(params, plain, str(self.place))
    params.pop("head", None)
    shape = (model.dim, model.scores)

    def draw() -> jax.Array:
      drawn = jax.random.normal(jax.random.key(seed), shape) / math.sqrt(shape[0])
      return drawn.astype(decoder.precision.params)

    sharding = decoder.layout.sharding("embed", None)
    return params | {"score": jax.jit(draw, out_shardings=sharding)()}

  def largest_difference(self, params: PyTree, tell: Tell = _nothing) -> float:
    """Returns the largest |difference| of parameters from what stands in the file."""
    if self.source is None:
      leaves = jax.tree.leaves(params)
      shardings = jax.tree.map(lambda x: x.sharding, params)
      shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
      back = own.restore(self.place, stream.Plan(shapes, shardings))
      tell(sum(leaf.size for leaf in leaves))
      pairs = zip(leaves, jax.tree.leaves(back), strict=True)
      return max(float(abs(a.astype("f4") - b.astype("f4")).max()) for a, b in pairs)
    plan = stream.Plan(params, None)
    return stream.largest_difference(self.source, self._entries(plan), params, tell)

  def _entries(self, plan: stream.Plan) -> list[Entry]:
    assert self.family is not None
    assert self.source is not None
    wanted = entries(self._table, self.model, stream.shapes_of(plan.shapes))
    check_tensors(self.source.shapes, wanted, str(self.place))
    return wanted

  @property
  def _table(self) -> Table:
    assert self.family is not None
    return self.family.hf.table if self.kind == "hf" else self.family.gguf.table

  def tokenizer(self, form: Kind | None = None) -> tokenizers.Tokenizer:
    """Returns the tokenizer that comes with the model, as suits what it is written to.

    GGUF can hold a tokenizer.model and seldom the tokenizer.json that was made of it.

    Raises:
      InputError: there is none, or it is of a kind that is not read.
    """
    if self.base is not None:
      return self.base.tokenizer(form)
    if isinstance(self.source, gguf.GGUFFile):
      return vocabulary.tokenizer_of(self.source.metadata, str(self.place))
    if form == "gguf" and (self.place / sentencepieces.MODEL_FILE).exists():
      return tokenizers.read_model(self.place, self.model.vocab)
    return tokenizers.read(self.place, self.model.vocab, "model")


def open_model(place: files.Pathlike, field: str = "model") -> Opened:
  """Opens a model; reads its description and the headers of its files.

  Raises:
    InputError: nothing is there, or what is there is not known; names `field`.
  """
  found = files.path(place)
  if not found.exists():
    raise InputError(
      f"{field}: {found} does not exist. Give a Hugging Face folder, a .gguf file, a "
      "folder that configs/convert.py wrote, or a run's workdir."
    )
  if not found.is_dir():
    if found.suffix in (".safetensors", ".json", ".bin"):
      raise InputError(f"{field}: {found} is one file of a folder; give the folder.")
    return _open_gguf(found)
  if own.is_one(found):
    found = files.absolute(found)  # which Orbax asks for
    told = own.describe(found)
    family = None if told.family is None else by_name(told.family)
    return Opened(found, "jaxlm", family, told.model, told.dtype, None, told.dtype)
  if peft_read.is_one(found):
    return _open_adapters(found, field)
  family, model = hf.read_config(found)
  source = hf.Safetensors(found, family)
  if model.head == "tied":
    theirs = {part.ours: row.theirs for row in family.hf.table for part in row.parts}
    hf.drop_tied_head(source, theirs["head"], theirs["embed/table"])
  kinds = sorted(source.dtypes)
  dtype = "bfloat16" if kinds == ["BF16"] else "float32"
  return Opened(found, "hf", family, model, dtype, source, ", ".join(kinds))


def check_declared(params: PyTree, decoder: Decoder, place: str) -> None:
  """Raises InputError where parameters hold more than the architecture has."""
  known = stream.shapes_of(stream.Plan.of(decoder).shapes)
  more = [name for name in stream.shapes_of(params) if name not in known]
  if more:
    raise InputError(
      f"{place}: holds {more[0]}, which is no part of the architecture but of a soft "
      "prompt or a bottleneck. It writes text and is compared, but no run starts from "
      "it, and no folder of a model has a place for it."
    )


def _open_adapters(folder: epath.Path, field: str) -> Opened:
  named = peft_read.base_of(folder)
  tried = (folder / named, files.path(named)) if named.strip("./") else ()
  places = [place for place in tried if place.exists()]
  if not places:
    raise InputError(
      f"{field}: {folder / peft_read.CONFIG}: base_model_name_or_path={named!r} is no "
      "folder here. Put the model's own folder there, or change the name in the file."
    )
  base = open_model(places[0], field)
  if base.family is None:
    raise InputError(f"{field}: {places[0]}: has no family, so no names as PEFT's.")
  told = f"{peft_read.kind_of(folder)} beside {base.place}, {base.stored}"
  return dataclasses.replace(base, place=folder, kind="peft", stored=told, base=base)


def _open_gguf(file: epath.Path) -> Opened:
  source = gguf.GGUFFile(file)
  family, model = gguf.read_metadata(source)
  return Opened(file, "gguf", family, model, "float32", source, source.types)


@contextlib.contextmanager
def _whole(target: epath.Path) -> Iterator[epath.Path]:
  """Gives a place beside the target, which becomes the target when all went well."""
  target.parent.mkdir(parents=True, exist_ok=True)
  aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
  try:
    yield aside
    if target.exists():
      raise InputError(f"{target}: exists; another process has made it meanwhile.")
    aside.rename(target)
  finally:
    if aside.is_dir():
      shutil.rmtree(aside, ignore_errors=True)
    else:
      aside.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Exported:
  """What is to be written."""

  model: LM
  family: Family | None
  """None: the first that can say the model."""
  params: PyTree
  tokenizer: tokenizers.Tokenizer | None

  def write(self, target: epath.Path, kind: Kind, dtype: str, tell: Tell) -> None:
    """Writes a file or a folder, whole or not at all.

    Raises:
      InputError: it exists, or the format cannot hold the model.
    """
    if target.exists():
      raise InputError(f"{target}: exists and is not overwritten; give another target.")
    with _whole(target) as place:
      if kind == "gguf":
        self._write_gguf(place, dtype, tell)
        return
      place.mkdir()
      if kind == "hf":
        self._write_hf(place, dtype, tell)
      else:
        name = None if self.family is None else self.family.name
        kept = "bfloat16" if dtype == "bfloat16" else "float32"
        told = own.Description(model=self.model, family=name, dtype=kept)
        own.save(place, told, self.params)
        tell(sum(leaf.size for leaf in jax.tree.leaves(self.params)))
      if self.tokenizer is not None:
        self.tokenizer.save(place)
      if kind == "jaxlm":
        own.seal(place)

  def check(self, kind: Kind, dtype: str) -> str:
    """Returns what the family is called in the target, before anything is loaded.

    Raises:
      InputError: the format cannot hold the model or the tokenizer.
    """
    if kind == "jaxlm":
      return "as it is" if self.family is None else self.family.name
    family = self.family or family_of(self.model)
    if kind == "hf":
      hf.write_config(family, self.model, dtype, {})
      return family.hf.architecture
    with tempfile.TemporaryDirectory() as folder:
      place = epath.Path(folder) / "x.gguf"
      writer = gguf.start_writing(place, family, self.model, dtype)
      if self.tokenizer is not None:
        vocabulary.write_vocabulary(writer, self.tokenizer, vocab=self.model.vocab)
    return family.gguf.architecture

  def _entries(self, table: Table) -> list[Entry]:
    return entries(table, self.model, stream.shapes_of(self.params))

  def _write_hf(self, place: epath.Path, dtype: str, tell: Tell) -> None:
    family = self.family or family_of(self.model)
    # Told also where there is none: transformers has defaults past a small vocabulary.
    ids: dict[str, Any] = dict.fromkeys(("bos", "eos", "pad"))
    if self.tokenizer is not None:
      ids |= {"bos": self.tokenizer.bos, "eos": self.tokenizer.eos}
      stops = {"eos_token_id": sorted(self.tokenizer.stops)}
      files.write_atomic(place / hf.GENERATION, json.dumps(stops, indent=2) + "\n")
    ids = {f"{name}_token_id": index for name, index in ids.items()}
    text = hf.write_config(family, self.model, dtype, ids)
    leaves = stream.named_leaves(self.params)
    places, size = {}, 0
    width = jax.numpy.dtype(dtype)
    wanted = self._entries(family.hf.table)
    for name, group in hf.shards(wanted, width.itemsize):
      tensors = {}
      for entry in group:
        tensors[entry.name] = stream.tensor_of(entry, leaves, width)
        size += tensors[entry.name].nbytes
        places[entry.name] = name
        tell(tensors[entry.name].size)
      hf.write_tensors(place / name, tensors)
    if len(set(places.values())) > 1:
      hf.write_index(place, places, size)
    files.write_atomic(place / hf.CONFIG, text)

  def _write_gguf(self, place: epath.Path, dtype: str, tell: Tell) -> None:
    family = self.family or family_of(self.model)
    writer = gguf.start_writing(place, family, self.model, dtype)
    if family.gguf.caveat and any(b.mixer.window for b in self.model.blocks):
      print(f"note: {family.gguf.caveat}")
    wanted = self._entries(family.gguf.table)
    leaves = stream.named_leaves(self.params)
    if self.tokenizer is None:
      writer.add_tokenizer_model("no_vocab")
    else:
      vocabulary.write_vocabulary(writer, self.tokenizer, vocab=self.model.vocab)

    def tensors() -> Iterator[np.ndarray]:
      for entry in wanted:
        yield stream.tensor_of(entry, leaves, np.float32)
        tell(int(np.prod(entry.shape)))

    factors = gguf.factors_of(family, self.model)
    gguf.write_tensors(writer, gguf.plan_types(wanted, dtype), tensors(), factors)
