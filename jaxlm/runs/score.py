"""Scores of a reward model, for the conversations or pairs of a file."""

import dataclasses
import itertools
import json
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from jaxlm import files
from jaxlm.data.conversations import Chats, Preferences, Stepwise, Tokens, read_units
from jaxlm.errors import InputError
from jaxlm.interop.checkpoint import open_model
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import Precision, for_length
from jaxlm.posttrain.objectives import SCORES, Reward, StepReward, scores
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout

_BUCKET = 64
"""Lengths are rounded up to a multiple of this, so that few programs are compiled."""
KINDS = {"chats": Chats, "pairs": Preferences, "steps": Stepwise}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
  """Writes the scores of a file's rows to another file."""

  model: str
  """A run of configs/reward_model.py: its workdir."""
  data: str
  """A .jsonl file or a glob; rows as configs/reward_model.py or sft.py read them."""
  out: str
  """The .jsonl file to write: a row for each row of the data, in order."""
  kind: Literal["chats", "pairs", "steps"] = "pairs"
  """What a row is: a chat, a pair of a chosen and a rejected answer, or steps."""
  batch: int = 8
  """Sequences scored at a time."""
  length: int = 1024
  """Longest sequence in tokens; a longer one is refused."""

  def __post_init__(self):
    for field in ("batch", "length"):
      if vars(self)[field] < 1:
        raise InputError(f"{field}: {vars(self)[field]} is under 1.")

  def run(self) -> list[dict[str, Any]]:
    """Writes the file; returns its rows.

    Raises:
      InputError: the model has no scores or not such ones, a row is too long or of an
        unknown shape, or the file is there already.
    """
    out = files.absolute(self.out)
    if out.exists():
      raise InputError(f"out: {out} is there already and is kept. Give another file.")
    opened = open_model(self.model)
    wanted = SCORES[StepReward if self.kind == "steps" else Reward]
    if opened.model.scores != wanted:
      raise InputError(
        f"model: {self.model} has {opened.model.scores} scores; kind={self.kind!r} "
        f"needs {wanted}, which a run of configs/reward_model.py has."
      )
    layout = Layout(make_mesh(Mesh(), jax.devices()[:1]))
    model = for_length(opened.model, self.length)
    decoder = Decoder(model, Precision(params=opened.dtype), layout)
    params = dataclasses.replace(opened, model=model).params(decoder)
    source = KINDS[self.kind](path=self.data)
    units = list(read_units(source, "data", opened.tokenizer()))
    for unit in units:
      longest = max(len(sequence.ids) for sequence in unit.sequences)
      if longest > self.length:
        raise InputError(
          f"{unit.where}: {longest} tokens; length is {self.length}. Raise it."
        )
    score = partial(jax.jit(partial(scores, decoder)), params)
    every = [sequence for unit in units for sequence in unit.sequences]
    found: list[np.ndarray] = []
    with jax.default_matmul_precision("highest"):
      for first in range(0, len(every), self.batch):
        found += self._scored(score, every[first : first + self.batch])
    per_unit = iter(zip(every, found, strict=True))
    rows = [
      self._row(list(itertools.islice(per_unit, len(unit.sequences)))) for unit in units
    ]
    files.write_atomic(out, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{out}: {len(rows)} rows{_told(rows)}")
    return rows

  def _scored(self, score: Any, sequences: list[Tokens]) -> list[np.ndarray]:
    """Returns the scores at every token of each sequence, [tokens, C]."""
    longest = max(len(sequence.ids) for sequence in sequences)
    shape = (self.batch, -(-longest // _BUCKET) * _BUCKET)
    tokens_BT, segments_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, sequence in enumerate(sequences):
      tokens_BT[row, : len(sequence.ids)] = sequence.ids
      segments_BT[row, : len(sequence.ids)] = 1
    positions_BT = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = {"tokens": tokens_BT, "segments": segments_BT, "positions": positions_BT}
    found_BTC = np.asarray(score(batch))
    return [found_BTC[row, : len(s.ids)] for row, s in enumerate(sequences)]

  def _row(self, scored: list[tuple[Tokens, np.ndarray]]) -> dict[str, Any]:
    if self.kind == "steps":
      ((sequence, found),) = scored
      at = np.flatnonzero(sequence.supervised)
      good = np.asarray(jax.nn.softmax(found[at], axis=-1))[:, 1]
      labels = np.asarray(sequence.labels)[at]
      return {"steps": good.tolist(), "labels": labels.tolist()}
    last = [float(found[-1, 0]) for _, found in scored]
    if self.kind == "pairs":
      return dict(zip(("chosen", "rejected"), last, strict=True))
    return {"score": last[0]}


def _told(rows: list[dict[str, Any]]) -> str:
  """Returns how often the model agrees with the data, where the data says."""
  if not rows or "score" in rows[0]:
    return ""
  if "chosen" in rows[0]:
    right = [row["chosen"] > row["rejected"] for row in rows]
    return f"; the chosen answer has the higher score in {np.mean(right):.1%}"
  right = [
    (step > 0.5) == (label == 1)
    for row in rows
    for step, label in zip(row["steps"], row["labels"], strict=True)
  ]
  return f"; {np.mean(right):.1%} of {len(right)} steps are judged as labelled"
