"""Log-probabilities under the weights a run starts from, made once, beside the data.

A file's name holds a hash of the weights and of what computes with them, and its folder
a hash of the rows, so what is found belongs to this run; its bytes are checked as well.
"""

import dataclasses
import json
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
from jaxlm.posttrain.objectives import REFERENCE, target_log_probs
from jaxlm.shapes import Array, PyTree
from jaxlm.sharding import processes
from jaxlm.trees import named_leaves

RECORD = "reference.json"
"""In the workdir: which weights this run's reference is."""

Place = Callable[[dict[str, np.ndarray]], dict[str, Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
  """What the pass over the data needs."""

  decoder: Decoder
  """The model on its layout."""
  chunk: int
  """Positions of each row whose logits are held at a time."""
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
  """Returns the corpus with the field `reference` in all of its rows.

  Args:
    reference: the model and how batches get onto the mesh.
    corpus: the rows.
    workdir: holds the record of which weights they are.
    initial: gives the weights that the run started from; of a resumed run it is called
      only where files are missing.
    resumed: whether the run goes on from a checkpoint; then the record must hold.

  Raises:
    InputError: the files are damaged, or the initial weights are not the recorded ones.
  """
  folder, record = Path(corpus.report.place), workdir / RECORD
  key = json.loads(record.read_text())["weights"] if resumed else None
  if key is not None and _agreed(_complete(folder, key)):
    print(f"reference: log-probabilities found in {folder}")
    return _load(folder, key, corpus)
  params = initial()
  found = fingerprint(reference.decoder, params)
  if key is not None and found != key:
    raise InputError(
      f"{record}: this run's reference was the weights {key}, and `initial` gives "
      f"{found}. Bring the first weights back, or give another --workdir."
    )
  if processes.first():
    files.write_atomic(record, json.dumps({"weights": found}))
  if _agreed(_complete(folder, found)):
    print(f"reference: log-probabilities found in {folder}")
  else:
    _write(reference, corpus, folder, found, params)
    print(f"reference: log-probabilities written in {folder}")
  return _load(folder, found, corpus)


def fingerprint(decoder: Decoder, params: PyTree) -> str:
  """Returns a hash of weights, of the architecture and of the dtype of computation.

  It is one function of the values: how they are sharded does not matter.
  """
  state = xxhash.xxh3_128()
  state.update(config.to_json(decoder.spec).encode())
  state.update(decoder.precision.compute.encode())
  whole = decoder.layout.sharding()
  mixed = jax.jit(lambda p: jax.tree.map(_mixed, p), out_shardings=whole)
  hashes = jax.device_get(mixed(params))
  for name, value in sorted(named_leaves(hashes).items()):
    state.update(f"{name}={int(value[0])},{int(value[1])};".encode())
  return state.hexdigest()


def _mixed(leaf: Array) -> Array:
  """Returns two sums over the bits of all elements, each stirred with its place."""
  width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32)
  place, stride = jnp.zeros(leaf.shape, jnp.uint32), 1
  for axis in reversed(range(leaf.ndim)):
    along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    place = place + along * jnp.uint32(stride % 2**32)
    stride *= leaf.shape[axis]
  sums = []
  for seed in (0x9E3779B9, 0x85EBCA6B):
    x = _stir(bits ^ _stir(place + jnp.uint32(seed)))
    sums.append(jnp.sum(x, dtype=jnp.uint32))
  return jnp.stack(sums)


def _stir(x: Array) -> Array:
  """Mixes 32 bits (the finalizer of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _name(key: str) -> str:
  return f"{REFERENCE}-{key}"


def _told(folder: Path, key: str) -> Path:
  return folder / f"{_name(key)}.json"


def _complete(folder: Path, key: str) -> bool:
  return _told(folder, key).exists()


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
  """Makes one pass over all rows; every process keeps the whole."""
  decoder, layout = reference.decoder, reference.decoder.layout
  whole = layout.sharding()

  def target(params: PyTree, batch: dict[str, Array]) -> Array:
    return target_log_probs(decoder, reference.chunk, params, batch).target_BT

  score = jax.jit(target, out_shardings=whole)
  hashes: dict[str, str] = {}
  total = sum(len(source) for _, _, source in _halves(corpus))
  print(f"reference: scoring {total:,} rows once")
  for index, half, source in _halves(corpus):
    parts = [np.zeros((0, corpus.report.seq_len), np.float32)]
    for batch in in_order([source], reference.batch, rows=reference.here):
      parts.append(np.asarray(score(params, reference.put(batch))))
    found_NT = np.concatenate(parts)[: len(source)]
    field = np.pad(found_NT, ((0, 0), (0, 1)))
    temporary = f"{_name(key)}.{uuid.uuid4().hex[:8]}"
    rows.write_field(_stem(folder, index, half), temporary, field)
    rows.rename_field(_stem(folder, index, half), temporary, _name(key))
    hashes[f"{index}.{half}"] = _hash(field)
  files.write_atomic(epath.Path(_told(folder, key)), json.dumps(hashes))


def _hash(field: np.ndarray) -> str:
  return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(field).data)


def _load(folder: Path, key: str, corpus: Corpus) -> Corpus:
  """Maps the files, each with the hash that was told of it."""
  hashes: dict[str, Any] = json.loads(_told(folder, key).read_text())
  mapped: dict[str, list[rows.Rows]] = {half: [] for half in HALVES}
  for index, half, source in _halves(corpus):
    shape = (len(source), corpus.report.seq_len + 1)
    try:
      field = rows.load_field(_stem(folder, index, half), _name(key), shape)
      if _hash(field) != hashes[f"{index}.{half}"]:
        raise ValueError("its bytes are not those that were written")
      if not math.isfinite(float(field.sum())):
        raise ValueError("it holds numbers that are not finite")
    except (OSError, ValueError, LookupError) as error:
      raise InputError(
        f"data.cache: the reference of {index}.{half} in {folder} is damaged ({error})."
        f" Delete {_told(folder, key)}; the next run makes it anew."
      ) from error
    extras = dict(source.extras) | {REFERENCE: field}
    mapped[half].append(dataclasses.replace(source, extras=extras))
  train, held_out = (tuple(mapped[half]) for half in HALVES)
  return dataclasses.replace(corpus, train=train, held_out=held_out)
