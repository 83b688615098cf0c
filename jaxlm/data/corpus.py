"""Sources to packed rows on disk: read, split, encode and pack once, then map.

The folder's name is a hash of all that its contents depend on, so a cache is either
right or absent. It is written under another name and renamed when it is whole.
"""

import contextlib
import dataclasses
import errno
import heapq
import json
import math
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
import tqdm
import xxhash
from etils import epath

from jaxlm import files
from jaxlm.data import pretrained, report, rows, sentencepieces, sources, tokenizers
from jaxlm.data.pretrained import Pretrained
from jaxlm.data.sentencepieces import SentencePiece
from jaxlm.errors import InputError

# Written into every cache's name: raise it when the same input gives other rows.
FORMAT = 1
HALVES = ("train", "held_out")
REPORT_FILE = "report.json"
_PROGRESS_BYTES = 4_000_000

Writers = dict[tuple[int, str], rows.Writer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted:
  """A source and its share of the rows that a run sees."""

  source: sources.Source
  """Where the documents are."""
  weight: float = 1.0
  """Its share of all rows is this over the sum of the weights."""

  def __post_init__(self):
    if not 0 < self.weight < math.inf:
      raise InputError(f"data.sources.weight: {self.weight} is not above 0 and finite.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
  """The text of a run, and how it becomes batches."""

  sources: tuple[Weighted, ...]
  """What to read; each is repeated and reshuffled as often as the run needs."""
  tokenizer: tokenizers.Spec
  """How text becomes ids."""
  seq_len: int
  """Inputs of a row, T."""
  batch: int
  """Rows of a batch over all processes, B."""
  held_out: float = 0.05
  """Share of the documents kept for evaluation, chosen by their content; 0: none."""
  seed: int = 0
  """Chooses the held-out documents and the order of the rows; 0 to 2^32 - 1."""
  cache: str | None = None
  """Local folder for the packed rows, shared by runs; None: inside the workdir."""
  threads: int = 2
  """Threads that make batches."""
  prefetch: int = 4
  """Batches made ahead of time, at least one a thread."""

  def __post_init__(self):
    for name in ("seq_len", "batch", "threads", "prefetch"):
      if vars(self)[name] < 1:
        raise InputError(f"data.{name}: {vars(self)[name]} is not at least 1.")
    if self.prefetch < self.threads:
      raise InputError(
        f"data.prefetch: {self.prefetch} is below data.threads={self.threads}, so some "
        "threads would never work."
      )
    if not self.sources:
      raise InputError("data.sources: empty; give at least one Weighted(source=...).")
    if not 0 <= self.held_out < 1:
      raise InputError(f"data.held_out: {self.held_out} is not in 0 <= share < 1.")
    if not 0 <= self.seed < 2**32:
      raise InputError(f"data.seed: {self.seed} is not in 0 <= seed < 2^32.")
    spec = self.tokenizer
    if isinstance(spec, SentencePiece) and spec.model is None:
      for index, weighted in enumerate(self.sources):
        if isinstance(weighted.source, sources.TokenIds):
          raise InputError(
            f"data.tokenizer.model: none, but data.sources.{index} holds token ids; "
            "give the model that made them."
          )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """What `prepare` returns."""

  tokenizer: tokenizers.Tokenizer
  """Encodes prompts, decodes samples."""
  train: tuple[rows.Rows, ...]
  """Rows to train on, by source."""
  held_out: tuple[rows.Rows, ...]
  """Rows to evaluate on, by source; some or all may be empty."""
  weights: tuple[float, ...]
  """Weight of each source."""
  report: report.Report
  """What a run prints at its start."""
  fingerprint: str
  """A hash of all that tokenizer and rows depend on."""


def prepare(data: Data, folder: files.Pathlike) -> Corpus:
  """Returns the corpus of a spec, from the cache where it is there.

  Args:
    data: what to read, and how.
    folder: the cache where `data.cache` is None.

  Raises:
    InputError: what `sources.read` and `tokenizers.build` raise; no document is held
      out, or all of a source are; the cache is remote, damaged or on a full disk.
  """
  fingerprint = _fingerprint(data)
  place = _cache(data, folder) / fingerprint
  reused = place.exists()
  if not reused:
    try:
      _write(data, place)
    except OSError as error:
      if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise InputError(
          f"data.cache: {place.parent} is full ({error.strerror}). Make room, or give "
          "data.cache another folder."
        ) from error
      raise
  return _open(data, place, reused)


def documents(data: Data) -> Iterator[tuple[int, str, sources.Document]]:
  """Yields (index of the source, "train" or "held_out", document), in reading order.

  The half depends on the document's content and the seed alone, so what occurs twice,
  also in two sources, falls on one side.
  """
  for index, weighted in enumerate(data.sources):
    field = f"data.sources.{index}.source"
    for document in sources.read(weighted.source, field, data.tokenizer.vocab):
      held_out = _digest(document, data.seed) < data.held_out * 2**64
      yield index, "held_out" if held_out else "train", document


def _digest(document: sources.Document, seed: int) -> int:
  content = document.content
  if isinstance(content, str):
    return xxhash.xxh3_64_intdigest(content.encode(), seed)
  return xxhash.xxh3_64_intdigest(content.astype("<u4").tobytes(), seed)


def _fingerprint(data: Data) -> str:
  """Returns the hash that names a cache: the specs and the bytes of all files."""
  facts = {
    "format": FORMAT,
    "seq_len": data.seq_len,
    "held_out": data.held_out,
    "seed": data.seed,
    "tokenizer": _facts(data.tokenizer),
    "sources": [_facts(weighted.source) for weighted in data.sources],
    "files": [],
  }
  found = [
    sources.find(weighted.source, f"data.sources.{index}.source")
    for index, weighted in enumerate(data.sources)
  ]
  if isinstance(data.tokenizer, SentencePiece):
    if data.tokenizer.model is None:
      facts["trainer"] = sentencepiece.__version__
    else:
      found.append([sentencepieces.model_file(data.tokenizer.model)])
  elif isinstance(data.tokenizer, Pretrained):
    group = pretrained.files_of(data.tokenizer.path, "data.tokenizer.path")
    # The same files in another folder make the same rows.
    facts["tokenizer"] = ["Pretrained", data.tokenizer.vocab, [f.name for f in group]]
    found.append(group)
  facts["files"] = [[_hash_file(file) for file in group] for group in found]
  return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True).encode())


def _facts(spec: sources.Source | tokenizers.Spec) -> list:
  return [type(spec).__name__, dataclasses.asdict(spec)]


def _hash_file(file: epath.Path) -> str:
  state = xxhash.xxh3_128()
  with file.open("rb") as stream:
    while chunk := stream.read(1 << 22):
      state.update(chunk)
  return state.hexdigest()


def _cache(data: Data, folder: files.Pathlike) -> Path:
  name = files.path(folder if data.cache is None else data.cache)
  if "://" in str(name):
    raise InputError(
      f"data.cache: {name} is remote, and rows are mapped into memory. Give "
      "data.cache a local folder."
    )
  try:
    name.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"data.cache: cannot make {name} ({error.strerror})") from error
  return Path(name)


def _write(data: Data, place: Path) -> None:
  """Writes a cache whole or not at all; another process may do the same meanwhile."""
  texts, size = _scan(data)
  tokenizer = tokenizers.build(data.tokenizer, texts)
  temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}.tmp")
  temporary.mkdir()
  try:
    told = _fill(data, tokenizer, temporary, size)
    (temporary / REPORT_FILE).write_text(told.to_json())
    _rename(temporary, place)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _fill(
  data: Data, tokenizer: tokenizers.Tokenizer, folder: Path, size: int
) -> report.Report:
  """Writes rows and tokenizer into an empty folder."""
  dtype = np.dtype(np.uint16 if tokenizer.vocab <= 2**16 else np.uint32)
  with contextlib.ExitStack() as stack:
    writers: Writers = {}
    for key in _halves(data):
      writers[key] = rows.Writer(_stem(folder, *key), dtype)
      stack.callback(writers[key].close)
    _encode(data, tokenizer, writers, size)
  tokenizers.save(tokenizer, str(folder))
  return report.Report(
    place=str(folder),
    reused=False,
    vocab=tokenizer.vocab,
    seq_len=data.seq_len,
    sources=tuple(
      report.SourceReport(
        path=weighted.source.path,
        train=writers[index, "train"].pack(data.seq_len),
        held_out=writers[index, "held_out"].pack(data.seq_len),
      )
      for index, weighted in enumerate(data.sources)
    ),
  )


def _halves(data: Data) -> list[tuple[int, str]]:
  return [(index, half) for index in range(len(data.sources)) for half in HALVES]


def _stem(folder: Path, index: int, half: str) -> Path:
  return folder / f"{index}.{half}"


def _rename(temporary: Path, place: Path) -> None:
  """Gives a whole cache its name, unless another process was first."""
  try:
    temporary.rename(place)
  except OSError:
    if not place.exists():
      raise


def _scan(data: Data) -> tuple[list[str], int]:
  """Reads everything once, so that bad input shows before the long work.

  Returns a sample of the training texts for a tokenizer, and the characters or ids of
  all documents. The sample is the texts of the lowest hashes: one drawn evenly from
  all files, whatever their order.
  """
  spec, limit = data.tokenizer, 0
  if isinstance(spec, SentencePiece) and spec.model is None:
    limit = spec.train_bytes
  counts = dict.fromkeys(_halves(data), 0)
  sample: list[tuple[int, int, bytes]] = []
  sampled = size = 0
  for number, (index, half, document) in enumerate(documents(data)):
    counts[index, half] += 1
    size += len(document.content)
    if limit and half == "train" and isinstance(document.content, str):
      text = document.content.encode()
      heapq.heappush(sample, (-_digest(document, data.seed), number, text))
      sampled += len(text)
      while sampled - len(sample[0][2]) >= limit:
        sampled -= len(heapq.heappop(sample)[2])
  _check_halves(data, counts)
  return [text.decode() for _, _, text in sorted(sample, reverse=True)], size


def _check_halves(data: Data, counts: dict[tuple[int, str], int]) -> None:
  indices = range(len(data.sources))
  total = sum(counts.values())
  if data.held_out and not any(counts[index, "held_out"] for index in indices):
    raise InputError(
      f"data.held_out: {data.held_out} of {total} documents came to none. Raise it, "
      "try another data.seed, cut the text into more documents "
      "(documents='paragraphs'), or set it to 0."
    )
  for index in indices:
    if not counts[index, "train"]:
      raise InputError(
        f"data.sources.{index}.source.path: all {counts[index, 'held_out']} documents "
        f"of {data.sources[index].source.path} are held out (data.held_out="
        f"{data.held_out}); none is left to train on."
      )


def _encode(
  data: Data, tokenizer: tokenizers.Tokenizer, writers: Writers, size: int
) -> None:
  """Hands the tokens of all documents, bos and eos around each, to the writers."""
  byte_lengths = tokenizer.byte_lengths()
  show = sys.stderr.isatty() and size > _PROGRESS_BYTES
  with tqdm.tqdm(total=size, desc="tokenize", unit_scale=True, disable=not show) as bar:
    for index, half, document in documents(data):
      ids = _ids(tokenizer, document)
      tokens = [tokenizer.bos, *ids, tokenizer.eos]
      writers[index, half].append(tokens, int(byte_lengths[tokens].sum()))
      bar.update(len(document.content))


def _ids(tokenizer: tokenizers.Tokenizer, document: sources.Document) -> list[int]:
  if not isinstance(document.content, str):
    return document.content.tolist()
  ids = tokenizer.encode(document.content)
  tokenizers.check_round_trip(tokenizer, document.content, ids, document.where)
  return ids


def _open(data: Data, place: Path, reused: bool) -> Corpus:
  """Maps a cache into memory."""
  indices = range(len(data.sources))
  try:
    told = report.from_json((place / REPORT_FILE).read_text())
    mapped = {
      (index, half): rows.load(
        _stem(place, index, half), vars(told.sources[index])[half].rows, data.seq_len
      )
      for index, half in _halves(data)
    }
    tokenizer = tokenizers.load(data.tokenizer, str(place))
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise InputError(
      f"data.cache: {place} is damaged ({error}). Delete this folder; the next run "
      "writes it anew."
    ) from error
  return Corpus(
    tokenizer=tokenizer,
    train=tuple(mapped[index, "train"] for index in indices),
    held_out=tuple(mapped[index, "held_out"] for index in indices),
    weights=tuple(weighted.weight for weighted in data.sources),
    report=dataclasses.replace(told, place=str(place), reused=reused),
    fingerprint=place.name,
  )
