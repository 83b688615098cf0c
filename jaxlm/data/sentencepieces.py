"""SentencePiece models: given, of a pretrained model, or trained on the run's text."""

import dataclasses
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import sentencepiece
import xxhash
from etils import epath

from jaxlm import files
from jaxlm.data import controls as control_tokens
from jaxlm.data import pieces
from jaxlm.data.controls import Controls
from jaxlm.errors import InputError

MODEL_FILE = "tokenizer.model"

# A model that is followed by these bytes has normalizer_spec.add_dummy_prefix = false:
# in protocol buffers the last value of a field counts, and messages merge.
_NO_PREFIX = b"\x1a\x02\x18\x00"
_LINE_CHARS = 4096
_QUIET = 2
# Threads add up counts in their own order: another number is another model.
_TRAINING_THREADS = 16


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


class SentencePieceTokenizer:
  """A SentencePiece model, with its ids spelt out as byte strings.

  The model alone names its bos and eos, and has no template. `controls` say more: what
  stands beside the model of a pretrained one.
  """

  def __init__(
    self,
    model: bytes,
    name: str,
    *,
    controls: Controls | None = None,
    vocab: int | None = None,
  ):
    """Reads a serialized model.

    Args:
      model: the bytes of the file.
      name: the file that errors should name.
      controls: control tokens, where the model is not all there is to know.
      vocab: ids, at least those of the model; more are padding.

    Raises:
      InputError: not a SentencePiece model, one without bos and eos, one of more than
        `vocab` ids, or controls that it lacks.
    """
    self.model, self.controls = model, controls
    self._processor = self._rest = _open(model, name)
    given = _completed(controls, self._processor, name)
    self.specials = _specials(given, self._processor, name)
    self._control = frozenset(self.specials.values())
    size = max(self._processor.vocab_size(), *(i + 1 for i in self.specials.values()))
    self.vocab = size if vocab is None else vocab
    if self.vocab < size:
      raise InputError(f"{name}: {size} ids are more than the {vocab} of vocab.")
    self.ends = control_tokens.resolve(
      given, self.specials, vocab=self.vocab, name=name
    )
    self.bos, self.eos, self.stops = self.ends.bos, self.ends.eos, self.ends.stops
    self.bos_token, self.eos_token = given.bos_token or "", given.eos_token or ""
    self.add_bos = given.add_bos is not False
    self.chat_template = given.chat_template
    self.adds_space = self._processor.normalize("x") != "x"
    if self.adds_space:
      self._rest = _open(model + _NO_PREFIX, name)
    self.pieces = [self._bytes_of(index) for index in range(self.vocab)]
    for index in self.specials.values():
      self.pieces[index] = b""
    self._letter = [
      self._processor.piece_to_id(f"<0x{value:02X}>") for value in pieces.SPACE.encode()
    ]

  def _bytes_of(self, index: int) -> bytes:
    processor = self._processor
    if index >= processor.vocab_size():
      return b""
    kinds = (processor.is_control, processor.is_unknown, processor.is_unused)
    if any(kind(index) for kind in kinds):
      return b""
    piece = processor.id_to_piece(index)
    if processor.is_byte(index):
      return pieces.of_byte_name(piece)
    return pieces.of_spaces(piece)

  def encode(self, text: str) -> list[int]:
    """See `Tokenizer`."""
    return self.encode_parts([text])

  def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
    """See `Tokenizer`."""
    return list(itertools.chain.from_iterable(self.encode_each(parts)))

  def encode_each(self, parts: Sequence[str | int]) -> list[list[int]]:
    """See `Tokenizer`."""
    found: list[list[int]] = []
    begun = False
    for part in parts:
      ids: list[int] = []
      if isinstance(part, int):
        ids.append(part)
      else:
        for number, words in enumerate(part.split(pieces.SPACE)):
          ids += self._letter if number else []
          ids += self._encode(words, begun=begun or bool(ids))
      found.append(ids)
      begun = begun or bool(ids)
    return found

  def _encode(self, text: str, *, begun: bool) -> list[int]:
    """Returns the ids of a text; `begun` says whether others come before it."""
    start = self._rest if begun else self._processor
    ids = start.encode(text)
    # A control token by the files beside it may be a word by the model itself.
    for parts in (pieces.cut(text, self.specials), list(text)):
      if self._control.isdisjoint(ids):
        break
      ids = start.encode(parts[0])
      ids += [index for part in parts[1:] for index in self._rest.encode(part)]
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """See `Tokenizer`."""
    text = pieces.join(self.pieces, ids)
    return text.removeprefix(" ") if self.adds_space else text

  def byte_lengths(self) -> np.ndarray:
    """See `Tokenizer`."""
    return pieces.lengths(self.pieces)

  def fingerprint(self) -> str:
    """See `Tokenizer`."""
    found = xxhash.xxh3_128(self.model)
    if self.controls is not None:
      found.update(
        repr((self.vocab, self.bos, self.eos, sorted(self.specials))).encode()
      )
    return found.hexdigest()

  def save(self, folder: epath.Path) -> None:
    """Writes the model and what controls it was given."""
    files.write_atomic(folder / MODEL_FILE, self.model)
    if self.controls is not None:
      control_tokens.write(self.controls, self.ends, kind=None, folder=folder)


def _open(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
  try:
    return sentencepiece.SentencePieceProcessor(model_proto=model)
  except RuntimeError as error:
    raise InputError(f"{name}: not a SentencePiece model ({error})") from error


def _completed(
  controls: Controls | None,
  processor: sentencepiece.SentencePieceProcessor,
  name: str,
) -> Controls:
  """Returns controls with the model's own bos and eos where they name none."""
  bos, eos = processor.bos_id(), processor.eos_id()
  if controls is None:
    if min(bos, eos) < 0:
      raise InputError(
        f"{name}: the model has bos id {bos} and eos id {eos}; both are needed to "
        "tell documents apart. Train it with --bos_id and --eos_id."
      )
    controls = Controls()
  own = {}
  if controls.bos_token is None and controls.bos_id is None and bos >= 0:
    own["bos_token"] = processor.id_to_piece(bos)
  if controls.eos_token is None and not controls.eos_ids and eos >= 0:
    own["eos_token"] = processor.id_to_piece(eos)
  return dataclasses.replace(controls, **own)


def _specials(
  controls: Controls, processor: sentencepiece.SentencePieceProcessor, name: str
) -> dict[str, int]:
  """Returns the control tokens by their text: the model's, and those beside it."""
  size = processor.vocab_size()
  found = {
    processor.id_to_piece(index): index
    for index in range(size)
    if processor.is_control(index)
  }
  for token in (controls.bos_token, controls.eos_token, *controls.specials):
    if token and not processor.is_unknown(index := processor.piece_to_id(token)):
      found[token] = index
  for token, index in controls.added:
    if index < size and processor.id_to_piece(index) != token:
      raise InputError(
        f"{name}: id {index} is {processor.id_to_piece(index)!r}, but {token!r} in "
        f"{control_tokens.CONFIG_FILE}."
      )
    found[token] = index
  return found


def model_file(model: str) -> epath.Path:
  """Returns the one file that `SentencePiece.model` names."""
  return files.find(model, "data.tokenizer.model")[0]


def train(spec: SentencePiece, texts: Iterable[str]) -> bytes:
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
    for line in re.split(f"[\n{pieces.SPACE}]", text):
      for start in range(0, len(line), _LINE_CHARS):
        yield line[start : start + _LINE_CHARS]
