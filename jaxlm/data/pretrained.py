"""The tokenizer of a pretrained model: `tokenizer.json` as Hugging Face writes it.

The library `tokenizers` splits and merges; what the ids stand for is read out of the
vocabulary, byte by byte, so that decoding is exact.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import xxhash
from etils import epath
from tokenizers import Tokenizer as Backend

from jaxlm import files
from jaxlm.data import controls as control_tokens
from jaxlm.data import pieces, sentencepieces
from jaxlm.data.controls import Controls
from jaxlm.errors import InputError

JSON_FILE = "tokenizer.json"

# What a decoder made of these alone says of the vocabulary's letters.
_BYTE_DECODERS = {"ByteLevel"}
_SPACE_DECODERS = {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
# Where a space is put in front: nowhere; of a text; of each part between control
# tokens, unless a space is there; of each such part.
Prefix = Literal["never", "first", "missing", "always"]
_SCHEMES: dict[str, Prefix] = {
  "always": "missing",
  "first": "first",
  "never": "never",
}
_Spelling = Literal["byte letters", "spaces", "spaces, bytes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
  """The tokenizer of a pretrained model, as published beside its weights."""

  path: str
  """A folder with tokenizer.json (Hugging Face) or tokenizer.model (SentencePiece).
  Where they are there, tokenizer_config.json, special_tokens_map.json,
  generation_config.json and config.json name its control tokens, and
  chat_template.jinja goes before the template in tokenizer_config.json."""
  vocab: int
  """Rows of the model's embedding; the tokenizer may have fewer ids, not more."""

  def __post_init__(self):
    if self.vocab < 1:
      raise InputError(f"data.tokenizer.vocab: {self.vocab} is not at least 1.")


def tokenizer_file(folder: files.Pathlike, field: str) -> epath.Path:
  """Returns the folder's tokenizer.json, or else its tokenizer.model.

  Raises:
    InputError: it has neither; the message names `field`.
  """
  place = files.path(folder)
  for name in (JSON_FILE, sentencepieces.MODEL_FILE):
    if (place / name).exists():
      return place / name
  raise InputError(
    f"{field}: neither {JSON_FILE} nor {sentencepieces.MODEL_FILE} in {place}. Give "
    "the folder of a pretrained model."
  )


def files_of(folder: files.Pathlike, field: str) -> list[epath.Path]:
  """Returns the files of a folder that its tokenizer depends on, sorted by name.

  Raises:
    InputError: as `tokenizer_file`.
  """
  file = tokenizer_file(folder, field)
  beside = [file.parent / name for name in control_tokens.FILES]
  return sorted([file, *(other for other in beside if other.exists())])


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Added:
  """A token that is found in a text before the model sees it."""

  id: int
  """Its place in the vocabulary."""
  content: str
  """Its text."""
  special: bool
  """Whether it is a control token."""
  lstrip: bool
  """Whether spaces before it are part of it."""
  rstrip: bool
  """Whether spaces after it are part of it."""


class JsonTokenizer:
  """A tokenizer.json, with its ids spelt out as byte strings.

  It must be byte-level (as GPT-2's) or write spaces as U+2581 (as SentencePiece's). A
  text that starts with a space keeps it: where the tokenizer puts a space in front of
  texts, such a text has two, as SentencePiece itself does it.
  """

  def __init__(
    self, document: str, name: str, *, controls: Controls, vocab: int | None = None
  ):
    """Reads a tokenizer.json.

    Args:
      document: the text of the file.
      name: the file that errors should name.
      controls: what the files beside it say.
      vocab: ids, at least the tokenizer's own; more are padding.

    Raises:
      InputError: not such a file, a kind of vocabulary that is not known here, more
        ids than `vocab`, or controls that the vocabulary lacks.
    """
    self.document, self.controls = document, controls
    try:
      data = _parse(document)
      spelling = _spelling(data, name)
      self._prefix = _take_prefix(data, name)
      known = _mark(data, controls)
      self._backend = _open(data, name)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
      raise InputError(f"{name}: not a {JSON_FILE} ({error!r})") from error
    vocabulary = self._backend.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values(), default=-1) + 1
    self.vocab = size if vocab is None else vocab
    if self.vocab < size:
      raise InputError(f"{name}: {size} ids are more than the {vocab} of vocab.")
    self._control = {token.id: token for token in known if token.special}
    self._words = tuple(token.content for token in known if not token.special)
    self.specials = {token.content: id for id, token in self._control.items()}
    self.ends = control_tokens.resolve(
      controls, self.specials, vocab=self.vocab, name=name
    )
    self.bos, self.eos, self.stops = self.ends.bos, self.ends.eos, self.ends.stops
    self.bos_token, self.eos_token = controls.bos_token or "", controls.eos_token or ""
    self.chat_template = controls.chat_template
    self.adds_space = self._prefix != "never"
    self.pieces = [b""] * self.vocab
    words = frozenset(self._words)
    silent = {*self.specials, *_unknown(data)}
    for token, index in vocabulary.items():
      if token not in silent:
        self.pieces[index] = _bytes_of(token, spelling, words)
    self._letter = _letter(spelling, vocabulary)
    self.add_bos = self._starts() if controls.add_bos is None else controls.add_bos

  def _starts(self) -> bool:
    """Says whether the file itself puts bos in front of a text."""
    found = self._backend.encode("a", add_special_tokens=True).ids
    return bool(self.bos_token) and found[:1] == [self.bos]

  def encode(self, text: str) -> list[int]:
    """See `Tokenizer`."""
    return self.encode_parts([text])

  def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
    """See `Tokenizer`."""
    return list(itertools.chain.from_iterable(self.encode_each(parts)))

  def encode_each(self, parts: Sequence[str | int]) -> list[list[int]]:
    """See `Tokenizer`; a control token takes spaces beside it as its file says."""
    found: list[list[int]] = []
    begun = words = False  # whether there is an id yet; whether words came last
    for place, part in enumerate(parts):
      if isinstance(part, int):
        found.append([part])
        begun, words = True, False
        continue
      if (before := self._beside(parts[max(place - 1, 0) : place])) and before.rstrip:
        part = part.lstrip()
      if (after := self._beside(parts[place + 1 : place + 2])) and after.lstrip:
        part = part.rstrip()
      spaced = part if words or not part else self._spaced(part, begun=begun)
      found.append(self._encode(spaced) if spaced else [])
      begun, words = begun or bool(found[-1]), words or bool(part)
    return found

  def _beside(self, parts: Sequence[str | int]) -> _Added | None:
    """Returns the control token that is the one part given, if it is one."""
    return next((self._control.get(i) for i in parts if isinstance(i, int)), None)

  def _spaced(self, text: str, *, begun: bool) -> str:
    """Returns a text with the space that belongs before it.

    `begun` says whether it follows a control token; else it is the first.
    """
    if not begun:
      # An added word at the start takes the place of the space.
      bare = text.startswith(self._words) and text[0] != " "
      return text if bare or not self.adds_space else f" {text}"
    missing = self._prefix == "missing" and text[0] != " "
    return f" {text}" if missing or self._prefix == "always" else text

  def _encode(self, text: str) -> list[int]:
    ids: list[int] = []
    for number, part in enumerate(text.split(pieces.SPACE) if self._letter else [text]):
      ids += self._letter if number else []
      ids += self._encode_words(part)
    return ids

  def _encode_words(self, text: str) -> list[int]:
    """Returns ids without a control token, though the model may have it for a word."""
    ids: list[int] = []
    for parts in ([text], pieces.cut(text, self.specials), list(text)):
      found = [self._backend.encode(part, add_special_tokens=False) for part in parts]
      ids = [index for part in found for index in part.ids]
      if self._control.keys().isdisjoint(ids):
        break
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
    found = xxhash.xxh3_128(self.document.encode())
    found.update(repr((self.vocab, self.bos, self.eos, sorted(self.specials))).encode())
    return found.hexdigest()

  def save(self, folder: epath.Path) -> None:
    """Writes tokenizer.json as it was read, and its controls."""
    files.write_atomic(folder / JSON_FILE, self.document)
    kind = "PreTrainedTokenizerFast"
    control_tokens.write(self.controls, self.ends, kind=kind, folder=folder)


def _parse(document: str) -> dict[str, Any]:
  """Returns what is in a tokenizer.json, without what would lose or vary ids."""
  data = json.loads(document)
  data["truncation"] = data["padding"] = None
  data["model"] |= {"dropout": None} if "dropout" in data["model"] else {}
  data.setdefault("added_tokens", [])
  return data


def _open(data: dict[str, Any], name: str) -> Backend:
  try:
    backend = Backend.from_str(json.dumps(data))
  except Exception as error:  # The library raises no class of its own.
    raise InputError(f"{name}: not a {JSON_FILE} ({error})") from error
  # Control tokens in a text are letters: only `encode_parts` takes their ids.
  backend.encode_special_tokens = True
  return backend


def _steps(data: dict[str, Any], field: str, inside: str) -> list[dict[str, Any]]:
  """Returns the steps of a field: one, those of a sequence, or none."""
  step = data.get(field)
  if step is None:
    return []
  return step[inside] if step["type"] == "Sequence" else [step]


def _spelling(data: dict[str, Any], name: str) -> _Spelling:
  """Returns how the vocabulary spells bytes, by the decoder that undoes it."""
  steps = _steps(data, "decoder", "decoders")
  kinds = {step["type"] for step in steps}
  if kinds == _BYTE_DECODERS:
    return "byte letters"
  replaced = [step for step in steps if step["type"] == "Replace"]
  plain = all(
    (step["pattern"], step["content"]) == ({"String": pieces.SPACE}, " ")
    for step in replaced
  )
  if plain and kinds & {"Metaspace", "Replace"} and kinds <= _SPACE_DECODERS:
    falls_back = "ByteFallback" in kinds or data["model"].get("byte_fallback")
    return "spaces, bytes" if falls_back else "spaces"
  told = ", ".join(step["type"] for step in steps) or "none"
  raise InputError(
    f"{name}: decoder: {told}. Only byte-level vocabularies (ByteLevel) and those that "
    "write a space as U+2581 (Metaspace, or Replace with ByteFallback) can be decoded "
    "to the letter."
  )


def _take_prefix(data: dict[str, Any], name: str) -> Prefix:
  """Takes out what puts a space in front of texts; returns where it did."""
  prefix: Prefix = "never"
  normalizers = _steps(data, "normalizer", "normalizers")
  kept = [step for step in normalizers if step["type"] != "Prepend"]
  if len(kept) < len(normalizers):
    prefix = "always"
    data["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
  for place, step in enumerate(_steps(data, "pre_tokenizer", "pretokenizers")):
    found: Prefix = "never"
    if step["type"] == "ByteLevel":
      found = "missing" if step["add_prefix_space"] else "never"
      step["add_prefix_space"] = False
    elif step["type"] == "Metaspace":
      old = "always" if step.pop("add_prefix_space", True) else "never"
      scheme = step.get("prepend_scheme", old)
      found = _SCHEMES[scheme]
      step["prepend_scheme"] = "never"
    if found != "never" and (place or prefix != "never"):
      raise InputError(
        f"{name}: pre_tokenizer: step {place}, {step['type']}, puts a space in front "
        "of each word, so that the text's own spaces are lost."
      )
    prefix = prefix if found == "never" else found
  return prefix


def _mark(data: dict[str, Any], controls: Controls) -> list[_Added]:
  """Marks what is named as a control token as one; returns all added tokens."""
  vocabulary = _vocabulary(data)
  named = {controls.bos_token, controls.eos_token, *controls.specials}
  present = {token["content"]: token for token in data["added_tokens"]}
  for content in sorted(token for token in named if token is not None):
    if content in present:
      present[content]["special"] = True
    elif content in vocabulary:
      flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
      token = {"id": vocabulary[content], "content": content, "special": True}
      data["added_tokens"].append(token | flags)
  data["added_tokens"].sort(key=lambda token: token["id"])
  fields = [field.name for field in dataclasses.fields(_Added)]
  return [
    _Added(**{field: token[field] for field in fields})
    for token in data["added_tokens"]
  ]


def _vocabulary(data: dict[str, Any]) -> dict[str, int]:
  """Returns the ids of the model's own pieces."""
  found = data["model"]["vocab"]
  if isinstance(found, dict):
    return found
  return {piece: index for index, (piece, _) in enumerate(found)}


def _unknown(data: dict[str, Any]) -> Iterator[str]:
  """Yields the piece that stands for letters that the model lacks."""
  model = data["model"]
  if isinstance(token := model.get("unk_token"), str):
    yield token
  if isinstance(index := model.get("unk_id"), int):
    yield model["vocab"][index][0]


def _bytes_of(piece: str, spelling: _Spelling, words: frozenset[str]) -> bytes:
  if spelling == "byte letters":
    return piece.encode() if piece in words else pieces.of_byte_letters(piece)
  if spelling == "spaces, bytes":
    return pieces.of_byte_name(piece)
  return pieces.of_spaces(piece)


def _letter(spelling: _Spelling, vocabulary: dict[str, int]) -> list[int]:
  """Returns the ids of U+2581 itself, by bytes; none where that cannot be told."""
  names = [f"<0x{value:02X}>" for value in pieces.SPACE.encode()]
  if spelling != "spaces, bytes" or not all(name in vocabulary for name in names):
    return []
  return [vocabulary[name] for name in names]
