"""The byte string that each id stands for: what decoding and bits per byte rest on."""

import itertools
import re
from collections.abc import Collection, Sequence

import numpy as np

from jaxlm.errors import InputError

# Metaspace vocabularies write a space as this letter.
SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _printable() -> dict[str, int]:
  """Returns the letters that byte-level vocabularies write bytes as.

  Source: GPT-2 (2019). A byte that Latin-1 prints is that letter; the others are the
  letters from U+0100 on, in order.
  """
  shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  hidden = [value for value in range(256) if value not in shown]
  letters = {chr(value): value for value in shown}
  return letters | {chr(256 + i): value for i, value in enumerate(hidden)}


BYTE_LETTERS = _printable()


def of_byte_letters(piece: str) -> bytes:
  """Returns the bytes of a byte-level piece; one with other letters is plain text."""
  try:
    return bytes([BYTE_LETTERS[letter] for letter in piece])
  except KeyError:
    return piece.encode()


def of_byte_name(piece: str) -> bytes:
  """Returns the byte that "<0x0A>" names; any other piece is its letters."""
  found = _BYTE.fullmatch(piece)
  return bytes([int(found[1], 16)]) if found else of_spaces(piece)


def of_spaces(piece: str) -> bytes:
  """Returns the bytes of a piece that writes a space as U+2581."""
  return piece.replace(SPACE, " ").encode()


def join(pieces: Sequence[bytes], ids: Sequence[int]) -> str:
  """Returns the text of ids; broken UTF-8 becomes U+FFFD.

  Raises:
    InputError: an id that is not in the vocabulary.
  """
  try:
    return b"".join([pieces[index] for index in ids]).decode(errors="replace")
  except IndexError as error:
    raise InputError(
      f"cannot decode the token id {max(ids)}: the tokenizer has {len(pieces)} ids"
    ) from error


def lengths(pieces: Sequence[bytes]) -> np.ndarray:
  """Returns the bytes of each piece, [vocab] int32."""
  return np.array([len(piece) for piece in pieces], np.int32)


def cut(text: str, words: Collection[str]) -> list[str]:
  """Splits a text after the first letter of each word that occurs in it.

  Parts that are encoded one by one then hold none of the words.
  """
  if not any(word in text for word in words):
    return [text]
  found = re.compile("(?=" + "|".join(map(re.escape, words)) + ")")
  at = [0, *(match.start() + 1 for match in found.finditer(text)), len(text)]
  return [text[a:b] for a, b in itertools.pairwise(at) if a < b]
