"""Text to token ids and back, losslessly: bytes and SentencePiece.

An id stands for a fixed byte string (a special for none), and the byte strings of an
encoded text join to that text. Bits per byte rests on it: see `check_round_trip`.
"""

import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
import sentencepiece
import xxhash
from etils import epath

from jaxlm import files
from jaxlm.errors import InputError

MODEL_FILE = "tokenizer.model"

# SentencePiece writes a space as this letter, so the letter itself must go by bytes.
_SPACE = "\u2581"
_LINE_CHARS = 4096
_QUIET = 2
# Threads add up counts in their own order: another number is another model.
_TRAINING_THREADS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
  """Every UTF-8 byte is a token; two more ids begin and end a document."""

  @property
  def vocab(self) -> int:
    """Number of ids."""
    return 258


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePiece:
  """A SentencePiece model, given as a file or trained on the run's training text."""

  model: str | None = None
  """A model file; None trains one, which is saved with the run."""
  vocab: int = 4096
  """Number of ids, specials included; a given model must have exactly so many."""
  kind: Literal["bpe", "unigram"] = "unigram"
  """How to train: unigram makes fewer tokens, BPE trains ten times faster."""
  train_bytes: int = 10_000_000
  """Train on a sample of about so many bytes of the training documents."""

  def __post_init__(self):
    if self.vocab < 1:
      raise InputError(f"data.tokenizer.vocab: {self.vocab} is not at least 1.")
    if self.train_bytes < 1:
      raise InputError(
        f"data.tokenizer.train_bytes: {self.train_bytes} is not at least 1."
      )


Spec = Bytes | SentencePiece


class Tokenizer(Protocol):
  """What the rest of jaxlm knows about a tokenizer."""

  @property
  def vocab(self) -> int:
    """Number of ids, specials included."""
    ...

  @property
  def bos(self) -> int:
    """The id that begins a document."""
    ...

  @property
  def eos(self) -> int:
    """The id that ends a document."""
    ...

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, never a special: "</s>" is four letters."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids; specials are nothing, broken UTF-8 becomes U+FFFD."""
    ...

  def byte_lengths(self) -> np.ndarray:
    """Returns the UTF-8 bytes that each id stands for, [vocab] int32; 0: special."""
    ...

  def fingerprint(self) -> str:
    """Returns a hash that differs where any text could be encoded differently."""
    ...


class ByteTokenizer:
  """The ids 0 to 255 are bytes, 256 begins a document and 257 ends it."""

  vocab = 258
  bos = 256
  eos = 257

  def encode(self, text: str) -> list[int]:
    """See `Tokenizer`."""
    return list(text.encode())

  def decode(self, ids: Sequence[int]) -> str:
    """See `Tokenizer`."""
    return _join(_BYTES, ids)

  def byte_lengths(self) -> np.ndarray:
    """See `Tokenizer`."""
    return _lengths(_BYTES)

  def fingerprint(self) -> str:
    """See `Tokenizer`."""
    return "bytes"


_BYTES = [bytes([value]) for value in range(256)] + [b"", b""]


class SentencePieceTokenizer:
  """A SentencePiece model, with its ids spelt out as byte strings."""

  def __init__(self, model: bytes, name: str):
    """Reads a serialized model; `name` is the file that errors should name.

    Raises:
      InputError: not a SentencePiece model, or one without bos and eos.
    """
    self.model = model
    try:
      self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
      raise InputError(f"{name}: not a SentencePiece model ({error})") from error
    self.vocab = self._processor.vocab_size()
    self.bos = self._processor.bos_id()
    self.eos = self._processor.eos_id()
    if min(self.bos, self.eos) < 0:
      raise InputError(
        f"{name}: the model has bos id {self.bos} and eos id {self.eos}; both are "
        "needed to tell documents apart. Train it with --bos_id and --eos_id."
      )
    self._pieces = [self._bytes_of(index) for index in range(self.vocab)]
    self._letter = [
      self._processor.piece_to_id(f"<0x{value:02X}>") for value in _SPACE.encode()
    ]

  def _bytes_of(self, index: int) -> bytes:
    processor = self._processor
    if processor.is_control(index) or processor.is_unknown(index):
      return b""
    piece = processor.id_to_piece(index)
    if processor.is_byte(index):
      return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode()

  def encode(self, text: str) -> list[int]:
    """See `Tokenizer`."""
    first, *rest = text.split(_SPACE)
    ids = self._processor.encode(first)
    for part in rest:
      ids += self._letter + self._processor.encode(part)
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """See `Tokenizer`."""
    return _join(self._pieces, ids)

  def byte_lengths(self) -> np.ndarray:
    """See `Tokenizer`."""
    return _lengths(self._pieces)

  def fingerprint(self) -> str:
    """See `Tokenizer`."""
    return xxhash.xxh3_128_hexdigest(self.model)


def _join(pieces: list[bytes], ids: Sequence[int]) -> str:
  try:
    return b"".join([pieces[index] for index in ids]).decode(errors="replace")
  except IndexError as error:
    raise InputError(
      f"cannot decode the token id {max(ids)}: the tokenizer has {len(pieces)} ids"
    ) from error


def _lengths(pieces: list[bytes]) -> np.ndarray:
  return np.array([len(piece) for piece in pieces], np.int32)


def build(spec: Spec, texts: Iterable[str]) -> Tokenizer:
  """Returns the tokenizer of a spec; `texts` are read only where one is trained.

  Raises:
    InputError: the model file is missing, broken or of another size, or the texts do
      not allow `vocab` ids.
  """
  if isinstance(spec, Bytes):
    return ByteTokenizer()
  if spec.model is None:
    return SentencePieceTokenizer(_train(spec, texts), MODEL_FILE)
  file = model_file(spec.model)
  tokenizer = SentencePieceTokenizer(file.read_bytes(), str(file))
  if tokenizer.vocab != spec.vocab:
    raise InputError(
      f"data.tokenizer.vocab: {spec.vocab}, but {file} has {tokenizer.vocab} ids. "
      f"Write data.tokenizer.vocab={tokenizer.vocab}."
    )
  return tokenizer


def model_file(model: str) -> epath.Path:
  """Returns the one file that `SentencePiece.model` names."""
  return files.find(model, "data.tokenizer.model")[0]


def save(tokenizer: Tokenizer, directory: files.Pathlike) -> None:
  """Writes `tokenizer.model`; bytes need no file."""
  if isinstance(tokenizer, SentencePieceTokenizer):
    files.write_atomic(files.path(directory) / MODEL_FILE, tokenizer.model)


def load(spec: Spec, directory: files.Pathlike) -> Tokenizer:
  """Returns the tokenizer that `save` wrote.

  Raises:
    InputError: there is none in the directory, or it is broken.
  """
  if isinstance(spec, Bytes):
    return ByteTokenizer()
  file = files.find(files.path(directory) / MODEL_FILE, "tokenizer")[0]
  return SentencePieceTokenizer(file.read_bytes(), str(file))


def check_round_trip(
  tokenizer: Tokenizer, text: str, ids: Sequence[int], where: str
) -> None:
  """Raises InputError where ids do not decode to the text they were made of.

  A model that was trained elsewhere may fold letters or spaces, add a space in front,
  or lack a letter. Then bytes are not predicted at all and bits per byte is wrong.
  """
  back = tokenizer.decode(ids)
  if back == text:
    return
  at = next(
    (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b),
    min(len(text), len(back)),
  )
  raise InputError(
    f"data.tokenizer.model: the tokenizer is lossy: {where}, letter {at}: "
    f"{text[at : at + 20]!r} came back as {back[at : at + 20]!r}. Use a model with "
    "identity normalization, no dummy prefix, all spaces kept and byte fallback, or "
    "leave data.tokenizer.model=none to train one."
  )


def _train(spec: SentencePiece, texts: Iterable[str]) -> bytes:
  """Returns the bytes of a model that keeps every byte of every text."""
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_lines(texts),
      model_writer=model,
      model_type=spec.kind,
      vocab_size=spec.vocab,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      byte_fallback=True,
      character_coverage=0.9999,
      user_defined_symbols=["\n", "\n\n", "\t"],
      max_sentence_length=8 * _LINE_CHARS,
      num_threads=_TRAINING_THREADS,
      minloglevel=_QUIET,
    )
  except RuntimeError as error:
    raise InputError(
      f"data.tokenizer.vocab: cannot train {spec.vocab} {spec.kind} pieces on the "
      f"training text: {str(error).rpartition('] ')[2]}"
    ) from error
  return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterable[str]:
  """Yields lines without what never is part of a learnt piece, cut to a bound."""
  for text in texts:
    for line in re.split(f"[\n{_SPACE}]", text):
      for start in range(0, len(line), _LINE_CHARS):
        yield line[start : start + _LINE_CHARS]
