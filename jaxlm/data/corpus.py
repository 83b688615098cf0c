"""Sources to packed rows on disk: read, split, encode and pack once, then map.

The folder's name is a hash of all that its contents depend on, so a cache is either
right or absent. It is written under another name and renamed when it is whole.
"""

import contextlib
import dataclasses
import errno
import heapq
import json
import shutil
import sys
import uuid
from pathlib import Path

import numpy as np
import sentencepiece
import tqdm
import xxhash
from etils import epath

from jaxlm import files
from jaxlm.data import (
  conversations,
  pretrained,
  report,
  rows,
  sentencepieces,
  sources,
  tokenizers,
)
from jaxlm.data.examples import digest, documents, size_of, text_fields, unit_fields
from jaxlm.data.pretrained import Pretrained
from jaxlm.data.sentencepieces import SentencePiece
from jaxlm.data.spec import Data, Source
from jaxlm.errors import InputError

# Written into every cache's name: raise it when the same input gives other rows.
FORMAT = 3
HALVES = ("train", "held_out")
REPORT_FILE = "report.json"
_PROGRESS_BYTES = 4_000_000

Writers = dict[tuple[int, str], rows.Writer]


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


def _fingerprint(data: Data) -> str:
  """Returns the hash that names a cache: the specs and the bytes of all files."""
  facts = {
    "format": FORMAT,
    "seq_len": data.seq_len,
    "held_out": data.held_out,
    "seed": data.seed,
    "packing": [data.truncate, data.per_row, data.even],
    "tokenizer": _facts(data.tokenizer),
    "sources": [_facts(weighted.source) for weighted in data.sources],
    "templates": [_template(weighted.source) for weighted in data.sources],
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


def _template(source: Source) -> str | None:
  """Returns the text of the template that a source names."""
  named = getattr(source, "template", None)
  return None if named is None else conversations.template_text(named)


def _facts(spec: Source | tokenizers.Spec) -> list:
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
  tokenizer = None
  if any(isinstance(w.source, conversations.Source) for w in data.sources):
    tokenizer = tokenizers.build(data.tokenizer, [])
  texts, size = _scan(data, tokenizer)
  tokenizer = tokenizer or tokenizers.build(data.tokenizer, texts)
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
  ids = np.uint16 if tokenizer.vocab <= 2**16 else np.uint32
  dtypes: dict[str, np.dtype] = {"tokens": np.dtype(ids)}
  dtypes |= data.extras
  if data.sequences > 1:
    dtypes["part"] = np.dtype(np.uint8)
  with contextlib.ExitStack() as stack:
    writers: Writers = {}
    for key in _halves(data):
      writers[key] = rows.Writer(_stem(folder, *key), dtypes)
      stack.callback(writers[key].close)
    dropped = _encode(data, tokenizer, writers, size)
  tokenizers.save(tokenizer, str(folder))

  def packed(index: int, half: str) -> report.Counts:
    talks = isinstance(data.sources[index].source, conversations.Source)
    return writers[index, half].pack(
      data.seq_len,
      most=data.per_row if talks else None,
      sequences=data.sequences,
      dropped=dropped[index, half],
    )

  return report.Report(
    place=str(folder),
    reused=False,
    vocab=tokenizer.vocab,
    seq_len=data.seq_len,
    sources=tuple(
      report.SourceReport(
        path=weighted.source.path,
        train=packed(index, "train"),
        held_out=packed(index, "held_out"),
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


def _scan(data: Data, tokenizer: tokenizers.Tokenizer | None) -> tuple[list[str], int]:
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
  for number, (index, half, document) in enumerate(documents(data, tokenizer)):
    counts[index, half] += 1
    size += size_of(document)
    content = document.content if isinstance(document, sources.Document) else None
    if limit and half == "train" and isinstance(content, str):
      text = content.encode()
      heapq.heappush(sample, (-digest(document, data.seed), number, text))
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
) -> dict[tuple[int, str], int]:
  """Hands all documents to the writers; returns how many were left out."""
  byte_lengths = tokenizer.byte_lengths()
  dropped = dict.fromkeys(writers, 0)
  show = sys.stderr.isatty() and size > _PROGRESS_BYTES
  with tqdm.tqdm(total=size, desc="tokenize", unit_scale=True, disable=not show) as bar:
    for index, half, document in documents(data, tokenizer):
      bar.update(size_of(document))
      if isinstance(document, conversations.Unit):
        fields = unit_fields(data, document)
        if fields is None:
          dropped[index, half] += 1
          continue
        predicted = int(np.count_nonzero(fields["weights"]))
      else:
        fields = text_fields(tokenizer, document)
        predicted = len(fields["tokens"]) - 1
      spoken = fields["tokens"][fields["weights"] > 0]
      size = int(byte_lengths[spoken].sum())
      writers[index, half].append(fields, size=size, predicted=predicted)
  _require_rows(data, dropped, writers)
  return dropped


def _require_rows(
  data: Data, dropped: dict[tuple[int, str], int], writers: Writers
) -> None:
  """Raises InputError where all conversations of a source were left out."""
  for index, weighted in enumerate(data.sources):
    if not writers[index, "train"].documents:
      raise InputError(
        f"data.seq_len: all {dropped[index, 'train']} conversations of "
        f"{weighted.source.path} are longer than a row of {data.seq_len}. Raise it, or "
        "give data.truncate 'start' or 'end'."
      )


def _open(data: Data, place: Path, reused: bool) -> Corpus:
  """Maps a cache into memory."""
  indices = range(len(data.sources))
  try:
    told = report.from_json((place / REPORT_FILE).read_text())
    mapped = {
      (index, half): rows.load(
        _stem(place, index, half),
        vars(told.sources[index])[half].rows,
        data.seq_len,
        tuple(data.extras),
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
