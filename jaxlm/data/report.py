"""What a prepared corpus holds, in numbers: printed at the start of a run."""

import dataclasses
import json
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
  """The training or the held-out half of a source."""

  documents: int
  """Documents, none empty."""
  bytes: int
  """UTF-8 bytes of their text."""
  tokens: int
  """Tokens that are predicted: all of the text's, and each document's end."""
  rows: int
  """Packed rows."""
  dropped: int = 0
  """Conversations left out because they are longer than a row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceReport:
  """One source."""

  path: str
  """Where it was read."""
  train: Counts
  """What is trained on."""
  held_out: Counts
  """What is only evaluated on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """A corpus, source by source; `str` gives the lines that a run prints."""

  place: str
  """The cache folder."""
  reused: bool
  """Whether the folder was there already."""
  vocab: int
  """Ids of the tokenizer."""
  seq_len: int
  """Inputs of a row."""
  sources: tuple[SourceReport, ...]
  """In the order of the config."""

  def total(self, half: str) -> Counts:
    """Returns the sum over the sources; half is "train" or "held_out"."""
    counts = [dataclasses.astuple(vars(source)[half]) for source in self.sources]
    documents, size, tokens, rows, dropped = map(sum, zip(*counts, strict=True))
    return Counts(
      documents=documents, bytes=size, tokens=tokens, rows=rows, dropped=dropped
    )

  def idle(self, counts: Counts) -> float:
    """Returns the share of positions that predict nothing: empty, between pieces, or of
    what a conversation does not teach, as prompts."""
    return 1 - counts.tokens / max(1, counts.rows * self.seq_len)

  def __str__(self) -> str:
    how = "reused" if self.reused else "written"
    lines = [f"data: vocabulary {self.vocab:,}; packed rows {how} in {self.place}"]
    for source in self.sources:
      lines += [
        f"  {source.path}",
        f"    train     {self._line(source.train)}",
        f"    held out  {self._line(source.held_out)}",
      ]
    return "\n".join(lines)

  def _line(self, counts: Counts) -> str:
    if not counts.documents:
      return "nothing"
    lost = f"; {counts.dropped:,} TOO LONG AND LEFT OUT" if counts.dropped else ""
    return (
      f"{counts.documents:,} documents, {counts.bytes:,} bytes, "
      f"{counts.tokens:,} tokens ({counts.bytes / counts.tokens:.3f} bytes a token), "
      f"{counts.rows:,} rows of {self.seq_len}; {self.idle(counts):.1%} of the places "
      f"predict nothing{lost}"
    )

  def to_json(self) -> str:
    """Returns the JSON that `from_json` reads."""
    return json.dumps(dataclasses.asdict(self), indent=2)


def from_json(text: str) -> Report:
  """Returns the report that `to_json` wrote; KeyError and the like where it did not."""
  value: dict[str, Any] = json.loads(text)
  sources = tuple(
    SourceReport(
      path=source["path"],
      train=Counts(**source["train"]),
      held_out=Counts(**source["held_out"]),
    )
    for source in value.pop("sources")
  )
  return Report(**value, sources=sources)
