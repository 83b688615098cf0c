"""What a frozen model says of every row, made once, beside the data.

A reference's log-probabilities of the targets, or a teacher's likeliest ids. A file's
name holds a hash of the weights and of what computes with them, and its folder a hash
of the rows, so what is found belongs to this run; its bytes are checked as well.
"""

import contextlib
import dataclasses
import json
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import xxhash
from etils import epath
from jax.experimental import multihost_utils

from jaxlm import config, files
from jaxlm.data import rows
from jaxlm.data.corpus import HALVES, Corpus
from jaxlm.data.loader import in_order
from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder
from jaxlm.shapes import Array, PyTree
from jaxlm.sharding import processes
from jaxlm.training.fingerprint import weights_hash
from jaxlm.training.objective import Batch, Field

Place = Callable[[dict[str, np.ndarray]], Batch]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
  """What the pass over the data needs."""

  what: Literal["reference", "teacher"]
  """What it is to the run; under this name the workdir says which weights it was."""
  decoder: Decoder
  """The model on its layout."""
  fields: tuple[Field, ...]
  """What is stored, and how it is named in a batch."""
  score: Callable[[PyTree, Batch], dict[str, Array]]
  """Makes the fields of a batch from the model's parameters."""
  options: str
  """What the fields depend on beside weights and rows."""
  batch: int
  """Rows of a batch over all processes."""
  here: list[int]
  """Rows of a batch that this process makes."""
  put: Place
  """Puts them on the mesh."""


def attach(
  reference: Reference,
  corpus: Corpus,
  workdir: epath.Path,
  initial: Callable[[], PyTree],
  *,
  resumed: bool,
) -> Corpus:
  """Returns the corpus with the fields in all of its rows.

  Args:
    reference: the model and how batches get onto the mesh.
    corpus: the rows.
    workdir: holds the record of which weights they are.
    initial: gives the model's weights; of a resumed run it is called only where files
      are missing.
    resumed: whether the run goes on from a checkpoint; then the record must hold.

  Raises:
    InputError: the files are damaged, or the weights are not the recorded ones.
  """
  what, folder = reference.what, Path(corpus.report.place)
  key = _recorded(what, workdir) if resumed else None
  if key is not None and _agreed(_complete(reference, folder, key)):
    print(f"{what}: log-probabilities found in {folder}")
    return _load(reference, folder, key, corpus)
  params = initial()
  found = fingerprint(reference.decoder, params, reference.options)
  record(what, workdir, found, resumed=resumed)
  if _agreed(_complete(reference, folder, found)):
    print(f"{what}: log-probabilities found in {folder}")
  else:
    _write(reference, corpus, folder, found, params)
    print(f"{what}: log-probabilities written in {folder}")
  return _load(reference, folder, found, corpus)


def record(what: str, workdir: epath.Path, found: str, *, resumed: bool) -> None:
  """Writes which weights a frozen model has; of a resumed run, compares them.

  Raises:
    InputError: they are not the recorded ones.
  """
  key = _recorded(what, workdir) if resumed else found
  if found != key:
    raise InputError(
      f"{workdir / what}.json: this run's {what} was the weights {key}, and now they "
      f"are {found}. Bring the first weights back, or give another --workdir."
    )
  if processes.first():
    place = workdir / f"{what}.json"
    files.write_atomic(place, json.dumps({"weights": found}))


def _recorded(what: str, workdir: epath.Path) -> str:
  place = workdir / f"{what}.json"
  if not place.exists():
    raise InputError(
      f"{place} is gone, so nothing says which weights this run's {what} was. Bring it "
      "back, or give another --workdir."
    )
  return json.loads(place.read_text())["weights"]


def fingerprint(decoder: Decoder, params: PyTree, options: str = "") -> str:
  """Returns a hash of weights, of the architecture, the dtype of computation, options.

  It is one function of the values: how they are sharded does not matter.
  """
  state = xxhash.xxh3_128()
  state.update(config.to_json(decoder.spec).encode())
  state.update((decoder.precision.compute + options).encode())
  state.update(weights_hash(decoder.layout, params).encode())
  return state.hexdigest()


def _told(reference: Reference, folder: Path, key: str) -> Path:
  return folder / f"{reference.what}-{key}.json"


def _complete(reference: Reference, folder: Path, key: str) -> bool:
  return _told(reference, folder, key).exists()


def _agreed(yes: bool) -> bool:
  """Says whether all processes say yes."""
  if processes.alone():
    return yes
  return bool(multihost_utils.process_allgather(np.int32(yes)).all())


def _stem(folder: Path, index: int, half: str) -> Path:
  return folder / f"{index}.{half}"


def _halves(corpus: Corpus) -> list[tuple[int, str, rows.Rows]]:
  return [
    (index, half, source)
    for half in HALVES
    for index, source in enumerate(getattr(corpus, half))
  ]


def _write(
  reference: Reference, corpus: Corpus, folder: Path, key: str, params: PyTree
) -> None:
  """Makes one pass over all rows; every process writes the whole."""
  whole = reference.decoder.layout.sharding()
  score = jax.jit(reference.score, out_shardings=whole)
  hashes: dict[str, str] = {}
  total = sum(len(source) for _, _, source in _halves(corpus))
  size = total * (corpus.report.seq_len + 1) * sum(map(_width, reference.fields))
  print(f"{reference.what}: scoring {total:,} rows once, {size / 1e6:,.1f} MB")
  for index, half, source in _halves(corpus):
    stem, own = _stem(folder, index, half), uuid.uuid4().hex[:8]
    with contextlib.ExitStack() as stack:
      writers = {
        field: stack.enter_context(
          rows.write_field(
            stem,
            f"{field.name}-{key}.{own}",
            np.dtype(field.dtype),
            _shape(field, source, corpus),
          )
        )
        for field in reference.fields
      }
      hashed = {field: xxhash.xxh3_128() for field in reference.fields}
      left = len(source)
      for batch in in_order([source], reference.batch, rows=reference.here):
        found = score(params, reference.put(batch))
        for field, write in writers.items():
          block = np.asarray(found[field.name], field.dtype)[:left]
          # A row has T + 1 tokens, and the last is no input.
          block = np.pad(block, ((0, 0), (0, 1)) + ((0, 0),) * (block.ndim - 2))
          hashed[field].update(np.ascontiguousarray(block).data)
          write(block)
        left -= reference.batch
    for field in reference.fields:
      rows.rename_field(stem, f"{field.name}-{key}.{own}", f"{field.name}-{key}")
      hashes[f"{stem.name}.{field.name}"] = hashed[field].hexdigest()
  told = epath.Path(_told(reference, folder, key))
  files.write_atomic(told, json.dumps(hashes))


def _width(field: Field) -> int:
  """Returns the bytes of a field at each token."""
  return math.prod(field.inner) * np.dtype(field.dtype).itemsize


def _shape(field: Field, source: rows.Rows, corpus: Corpus) -> tuple[int, ...]:
  return (len(source), corpus.report.seq_len + 1, *field.inner)


def _load(reference: Reference, folder: Path, key: str, corpus: Corpus) -> Corpus:
  """Maps the files, each with the hash that was told of it."""
  told = _told(reference, folder, key)
  hashes: dict[str, Any] = json.loads(told.read_text())
  mapped: dict[str, list[rows.Rows]] = {half: [] for half in HALVES}
  for index, half, source in _halves(corpus):
    stem, extras = _stem(folder, index, half), dict(source.extras)
    try:
      for field in reference.fields:
        shape = _shape(field, source, corpus)
        values = rows.load_field(stem, f"{field.name}-{key}", shape)
        if _hash(values) != hashes[f"{stem.name}.{field.name}"]:
          raise ValueError("its bytes are not those that were written")
        floats = np.issubdtype(values.dtype, np.floating)
        if floats and not math.isfinite(float(values.sum(dtype=np.float64))):
          raise ValueError("it holds numbers that are not finite")
        extras[field.name] = values
    except (OSError, ValueError, LookupError) as error:
      raise InputError(
        f"data.cache: the {reference.what} of {stem.name} in {folder} is damaged "
        f"({error}). Delete {told}; the next run makes it anew."
      ) from error
    mapped[half].append(dataclasses.replace(source, extras=extras))
  train, held_out = (tuple(mapped[half]) for half in HALVES)
  return dataclasses.replace(corpus, train=train, held_out=held_out)


def _hash(values: np.ndarray) -> str:
  state = xxhash.xxh3_128()
  for first in range(0, len(values), 1024):
    state.update(np.ascontiguousarray(values[first : first + 1024]).data)
  return state.hexdigest()
