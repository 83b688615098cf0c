"""What a run reads, and how it becomes batches: the part of a config about data."""

import dataclasses
import math
from typing import Literal

import numpy as np

from jaxlm.data import conversations, sources, tokenizers
from jaxlm.data.sentencepieces import SentencePiece
from jaxlm.errors import InputError

Source = sources.Source | conversations.Source
Truncate = Literal["drop", "start", "end"]
VALUED = (conversations.Preferences, conversations.Labelled)
"""Sources whose examples have a value: a margin or a label."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted:
  """A source and its share of the rows that a run sees."""

  source: Source
  """Where the documents or conversations are."""
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
  truncate: Truncate = "drop"
  """What becomes of a conversation that is longer than a row: it is left out, or cut at
  its start or end. Of a pair the start of the prompt is cut alike in both."""
  per_row: int = 16
  """Most conversations, or pairs, that share a row; 1: none does. Text has no limit."""
  even: bool = False
  """Whether each conversation weighs the same instead of each supervised token; not
  beside text, which has no conversations."""
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
    for name in ("seq_len", "batch", "threads", "prefetch", "per_row"):
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
        if isinstance(weighted.source, sources.TokenIds | conversations.Source):
          raise InputError(
            f"data.tokenizer.model: none, but data.sources.{index} is "
            f"{type(weighted.source).__name__}; give a model that is made already."
          )
    talks = [isinstance(w.source, conversations.Source) for w in self.sources]
    if self.even and not all(talks):
      raise InputError("data.even: a source of text has no conversations; give False.")
    counts = {_sequences(weighted.source) for weighted in self.sources}
    if len(counts) > 1:
      kinds = ", ".join(type(weighted.source).__name__ for weighted in self.sources)
      raise InputError(
        f"data.sources: {kinds} cannot be mixed: some have {min(counts)} sequence to "
        f"an example and others {max(counts)}."
      )

  @property
  def sequences(self) -> int:
    """Sequences of an example that stand in one row: 2 where there are pairs."""
    return _sequences(self.sources[0].source)

  @property
  def extras(self) -> dict[str, np.dtype]:
    """Fields of a row beside tokens and segments, as `packing.examples` takes them."""
    kinds = [weighted.source for weighted in self.sources]
    found = {}
    if any(isinstance(kind, conversations.Source) for kind in kinds):
      found["weights"] = np.dtype(np.float32)
    if any(isinstance(kind, VALUED) for kind in kinds):
      found["values"] = np.dtype(np.float32)
    if any(isinstance(kind, conversations.Stepwise) for kind in kinds):
      found["labels"] = np.dtype(np.int32)
    return found


def _sequences(source: Source) -> int:
  if isinstance(source, conversations.Source):
    return conversations.sequences_of(source)
  return 1
