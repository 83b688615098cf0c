"""Documents and conversations one by one, and the fields of their tokens."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xxhash

from jaxlm.data import conversations, sources, tokenizers
from jaxlm.data.spec import Data

UNLABELLED = -1
"""The label of a token that ends no step."""


class Item(NamedTuple):
  """A document and where it goes."""

  source: int
  """Its source's index."""
  half: str
  """"train" or "held_out"."""
  document: sources.Document | conversations.Unit


def documents(
  data: Data, tokenizer: tokenizers.Tokenizer | None = None
) -> Iterator[Item]:
  """Yields what the sources hold, in reading order.

  The half depends on the document's content and the seed alone, so what occurs twice,
  also in two sources, falls on one side; of preferences and labels it depends on the
  prompt. `tokenizer` is needed where there are conversations.
  """
  for index, weighted in enumerate(data.sources):
    field = f"data.sources.{index}.source"
    source = weighted.source
    if isinstance(source, conversations.Source):
      assert tokenizer is not None
      found = conversations.read_units(source, field, tokenizer)
    else:
      found = sources.read(source, field, data.tokenizer.vocab)
    for document in found:
      held_out = digest(document, data.seed) < data.held_out * 2**64
      yield Item(index, "held_out" if held_out else "train", document)


def digest(document: sources.Document | conversations.Unit, seed: int) -> int:
  """Returns a hash that says which half it belongs to."""
  if isinstance(document, conversations.Unit):
    first = document.sequences[0]
    prompt = first.supervised.index(True) if document.prompted else None
    content = np.array(first.ids[:prompt])
  else:
    content = document.content
  if isinstance(content, str):
    return xxhash.xxh3_64_intdigest(content.encode(), seed)
  return xxhash.xxh3_64_intdigest(content.astype("<u4").tobytes(), seed)


def size_of(document: sources.Document | conversations.Unit) -> int:
  """Returns its characters, or its ids."""
  if isinstance(document, conversations.Unit):
    return sum(len(sequence.ids) for sequence in document.sequences)
  return len(document.content)


def text_fields(
  tokenizer: tokenizers.Tokenizer, document: sources.Document
) -> dict[str, np.ndarray]:
  """Returns the fields of a text: bos and eos around it, all supervised."""
  tokens = np.array([tokenizer.bos, *_ids(tokenizer, document), tokenizer.eos])
  return {"tokens": tokens, "weights": np.ones(len(tokens), np.float32)}


def unit_fields(data: Data, unit: conversations.Unit) -> dict[str, np.ndarray] | None:
  """Returns the fields of a conversation or pair; None where it is left out."""
  parts = _fitted(data, unit.sequences)
  if parts is None:
    return None
  weights = [np.array(part.supervised, np.float32) for part in parts]
  for part in weights:
    part[0] = 0  # nothing comes before it that could predict it
    if not part.any():
      return None  # the cut took all that is supervised
  if data.even:
    weights = [part / part.sum() for part in weights]
  tokens = np.concatenate([part.ids for part in parts])
  labels = [
    np.where(part.supervised, part.labels or [0] * len(part.ids), UNLABELLED)
    for part in parts
  ]
  return {
    "tokens": tokens,
    "weights": np.concatenate(weights),
    "values": np.full(len(tokens), unit.value, np.float32),
    "labels": np.concatenate(labels).astype(np.int32),
    "part": np.repeat(np.arange(len(parts)), [len(part.ids) for part in parts]),
  }


def _fitted(
  data: Data, parts: tuple[conversations.Tokens, ...]
) -> list[conversations.Tokens] | None:
  """Returns the sequences cut to fit into a row; None where they cannot be."""
  room, lengths = data.seq_len, [len(part.ids) for part in parts]
  over = sum(lengths) - room
  if over <= 0:
    return list(parts)
  if data.truncate == "drop":
    return None
  if data.truncate == "start":
    each = -(-over // len(parts))
    if len(parts) > 1 and any(part.supervised.index(True) <= each for part in parts):
      return None  # no prompt would be left
    cuts = [slice(each, None)] * len(parts)
  else:
    longest = max(room // len(parts), room - min(lengths) * (len(parts) - 1))
    cuts = [slice(longest)] * len(parts)
  return [
    part._replace(
      ids=part.ids[cut],
      supervised=part.supervised[cut],
      labels=None if part.labels is None else part.labels[cut],
    )
    for part, cut in zip(parts, cuts, strict=True)
  ]


def _ids(tokenizer: tokenizers.Tokenizer, document: sources.Document) -> list[int]:
  if not isinstance(document.content, str):
    return document.content.tolist()
  ids = tokenizer.encode(document.content)
  tokenizers.check_round_trip(tokenizer, document.content, ids, document.where)
  return ids
