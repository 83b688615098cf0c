"""Text to token ids and back, losslessly: bytes, SentencePiece, pretrained ones.

An id stands for a fixed byte string (a special for none), and the byte strings of an
encoded text join to that text. Bits per byte rests on it: see `check_round_trip`.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from etils import epath

from jaxlm import files
from jaxlm.data import controls, pieces, pretrained, sentencepieces
from jaxlm.data.pretrained import JsonTokenizer, Pretrained
from jaxlm.data.sentencepieces import SentencePiece, SentencePieceTokenizer
from jaxlm.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
  """Every UTF-8 byte is a token; two more ids begin and end a document."""

  @property
  def vocab(self) -> int:
    """Number of ids."""
    return 258


Spec = Bytes | SentencePiece | Pretrained


class Tokenizer(Protocol):
  """What the rest of jaxlm knows about a tokenizer."""

  @property
  def vocab(self) -> int:
    """Number of ids, specials and padding included."""
    ...

  @property
  def bos(self) -> int:
    """The id that begins a document; a tokenizer without one repeats an end token."""
    ...

  @property
  def eos(self) -> int:
    """The id that ends a document."""
    ...

  @property
  def bos_token(self) -> str:
    """What chat templates write for bos; "" where the tokenizer has none."""
    ...

  @property
  def eos_token(self) -> str:
    """What chat templates write for eos; "" where it has no text."""
    ...

  @property
  def stops(self) -> frozenset[int]:
    """All ids that end a text or a turn, eos among them."""
    ...

  @property
  def specials(self) -> Mapping[str, int]:
    """The control tokens by their text."""
    ...

  @property
  def add_bos(self) -> bool:
    """Whether a text is to be started with bos, as the model was trained."""
    ...

  @property
  def adds_space(self) -> bool:
    """Whether ids hold a space in front of each text, which `decode` takes off."""
    ...

  @property
  def chat_template(self) -> str | None:
    """The Jinja template of a chat: see `chat.py`."""
    ...

  @property
  def pieces(self) -> Sequence[bytes]:
    """The bytes that each id stands for, [vocab]; none for a special.

    A text that goes on, such as a stream, is the join of them: `decode` takes its ids
    for a whole text, and takes a leading space off where `adds_space`.
    """
    ...

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, never a special: "</s>" is four letters."""
    ...

  def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
    """Returns the ids of one text that is given as words and the ids between them."""
    ...

  def encode_each(self, parts: Sequence[str | int]) -> list[list[int]]:
    """Returns the ids of each part; joined, they are those of `encode_parts`.

    Words right after words go on with them: no token reaches over the border, and no
    space is put there.
    """
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

  def save(self, folder: epath.Path) -> None:
    """Writes the files that `load` needs."""
    ...


class ByteTokenizer:
  """The ids 0 to 255 are bytes, 256 begins a document and 257 ends it."""

  vocab = 258
  bos = 256
  eos = 257
  bos_token = eos_token = ""
  stops = frozenset({257})
  specials: Mapping[str, int] = {}
  add_bos = True
  adds_space = False
  chat_template: str | None = None
  pieces: Sequence[bytes] = (*(bytes([value]) for value in range(256)), b"", b"")

  def encode(self, text: str) -> list[int]:
    """See `Tokenizer`."""
    return list(text.encode())

  def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
    """See `Tokenizer`."""
    return list(itertools.chain.from_iterable(self.encode_each(parts)))

  def encode_each(self, parts: Sequence[str | int]) -> list[list[int]]:
    """See `Tokenizer`."""
    return [[part] if isinstance(part, int) else list(part.encode()) for part in parts]

  def decode(self, ids: Sequence[int]) -> str:
    """See `Tokenizer`."""
    return pieces.join(self.pieces, ids)

  def byte_lengths(self) -> np.ndarray:
    """See `Tokenizer`."""
    return pieces.lengths(self.pieces)

  def fingerprint(self) -> str:
    """See `Tokenizer`."""
    return "bytes"

  def save(self, folder: epath.Path) -> None:
    """Bytes need no file."""


def build(spec: Spec, texts: Iterable[str]) -> Tokenizer:
  """Returns the tokenizer of a spec; `texts` are read only where one is trained.

  Raises:
    InputError: the files are missing, broken or of another size, or the texts do not
      allow `vocab` ids.
  """
  if isinstance(spec, Bytes):
    return ByteTokenizer()
  if isinstance(spec, Pretrained):
    return read(spec.path, spec.vocab, "data.tokenizer.path")
  if spec.model is None:
    model = sentencepieces.train(spec, texts)
    return SentencePieceTokenizer(model, sentencepieces.MODEL_FILE)
  file = sentencepieces.model_file(spec.model)
  tokenizer = SentencePieceTokenizer(file.read_bytes(), str(file))
  if tokenizer.vocab != spec.vocab:
    raise InputError(
      f"data.tokenizer.vocab: {spec.vocab}, but {file} has {tokenizer.vocab} ids. "
      f"Write data.tokenizer.vocab={tokenizer.vocab}."
    )
  return tokenizer


def read(folder: files.Pathlike, vocab: int | None, field: str) -> Tokenizer:
  """Returns the tokenizer of a pretrained model's folder.

  Args:
    folder: what `Pretrained.path` describes.
    vocab: ids, the tokenizer's own or more; None: as many as it has.
    field: what errors about the folder should name.

  Raises:
    InputError: files are missing or broken, or the tokenizer has more ids.
  """
  file = pretrained.tokenizer_file(folder, field)
  found, name = controls.read(file.parent), str(file)
  if file.name == pretrained.JSON_FILE:
    return JsonTokenizer(files.read_text(file), name, controls=found, vocab=vocab)
  return SentencePieceTokenizer(file.read_bytes(), name, controls=found, vocab=vocab)


def read_model(folder: files.Pathlike, vocab: int | None) -> Tokenizer:
  """Returns the tokenizer of a folder's tokenizer.model, whatever else is in it.

  Raises:
    InputError: as `read`.
  """
  file = files.path(folder) / sentencepieces.MODEL_FILE
  found = controls.read(file.parent)
  return SentencePieceTokenizer(
    file.read_bytes(), str(file), controls=found, vocab=vocab
  )


def save(tokenizer: Tokenizer, directory: files.Pathlike) -> None:
  """Writes the files that `load` needs: `tokenizer.model` or `tokenizer.json`.

  Beside it stands `tokenizer_config.json` where the tokenizer was read with one; such
  a directory can be given as `Pretrained.path`.
  """
  tokenizer.save(files.path(directory))


def load(spec: Spec, directory: files.Pathlike) -> Tokenizer:
  """Returns the tokenizer that `save` wrote.

  Raises:
    InputError: there is none in the directory, or it is broken.
  """
  if isinstance(spec, Bytes):
    return ByteTokenizer()
  if isinstance(spec, Pretrained):
    return read(directory, spec.vocab, "tokenizer")
  name = files.path(directory) / sentencepieces.MODEL_FILE
  file = files.find(name, "tokenizer")[0]
  return SentencePieceTokenizer(file.read_bytes(), str(file))


def notes(tokenizer: Tokenizer) -> list[str]:
  """Returns what a run should say of a tokenizer: each a line."""
  said = []
  if tokenizer.specials and not tokenizer.bos_token:
    token = next((t for t, i in tokenizer.specials.items() if i == tokenizer.bos), "")
    said.append(f"no bos of its own: documents begin with id {tokenizer.bos} {token}")
  if tokenizer.adds_space:
    said.append("a space in front of each text is among its ids, and decodes to none")
  return said


def check_round_trip(
  tokenizer: Tokenizer, text: str, ids: Sequence[int], where: str
) -> None:
  """Raises InputError where ids do not decode to the text they were made of.

  A tokenizer that was trained elsewhere may fold letters or spaces, or lack a letter.
  Then bytes are not predicted at all and bits per byte is wrong.
  """
  back = tokenizer.decode(ids)
  if back == text:
    return
  at = next(
    (i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b),
    min(len(text), len(back)),
  )
  raise InputError(
    f"data.tokenizer: the tokenizer is lossy: {where}, letter {at}: "
    f"{text[at : at + 20]!r} came back as {back[at : at + 20]!r}. Give texts that it "
    "keeps (such as text in NFC), a tokenizer without normalization, with all spaces "
    "kept and a fallback to bytes, or train one: data.tokenizer=SentencePiece."
  )
