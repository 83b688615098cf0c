"""Conversations as rows: what is cut, what is left out, what a token weighs."""

import dataclasses
import json

import numpy as np
import pytest

from jaxlm.data import corpus, examples, loader
from jaxlm.data.conversations import Chats, Labelled, Preferences
from jaxlm.data.sources import Jsonl
from jaxlm.data.spec import Data, Weighted
from jaxlm.data.tokenizers import Bytes, ByteTokenizer
from jaxlm.errors import InputError

PAIRS = [
  {"prompt": f"question {i}", "chosen": "yes " * (1 + i % 3), "rejected": "no"}
  for i in range(20)
]
CHATS = [{"prompt": f"question {i}", "completion": "ab" * (1 + i)} for i in range(20)]


@pytest.fixture
def data(tmp_path):
  def make(rows, kind, **fields):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"kl": True} if kind is Labelled else {}
    defaults = {"seq_len": 64, "batch": 4, "held_out": 0.0}
    return Data(
      sources=(Weighted(source=kind(path=str(path), **options)),),
      tokenizer=Bytes(),
      **(defaults | fields),
    )

  return make


def batches(data, tmp_path):
  """All rows in order as one batch, and what was told of them."""
  prepared = corpus.prepare(data, tmp_path / "cache")
  count = len(prepared.train[0])
  (batch,) = loader.in_order(prepared.train, count)
  return batch, prepared.report.total("train")


def segments(batch):
  """Yields (tokens, weights of targets) of each sequence, row by row."""
  for row in range(len(batch["tokens"])):
    for number in range(1, batch["segments"][row].max() + 1):
      here = batch["segments"][row] == number
      yield (
        bytes(batch["tokens"][row][here].astype(np.uint8)),
        batch["weights"][row][here],
      )


def test_a_pair_stands_in_one_row_and_its_answers_alone_have_weight(data, tmp_path):
  batch, told = batches(data(PAIRS, Preferences), tmp_path)
  assert set(batch) == {
    "tokens", "targets", "segments", "positions", "weights", "values",
  }  # fmt: skip
  found = list(segments(batch))
  assert len(found) == 2 * told.documents == 40
  for chosen, rejected in zip(found[::2], found[1::2], strict=True):
    prompt = chosen[0].split(b"yes")[0]
    assert rejected[0].startswith(prompt + b"no")
    assert rejected[1].tolist() == [0] * (len(prompt) - 1) + [1, 1, 1, 0]
  assert told.tokens == batch["weights"].sum()


def test_per_row_limits_what_shares_a_row(data, tmp_path):
  batch, told = batches(data(PAIRS, Preferences, per_row=1), tmp_path)
  assert len(batch["tokens"]) == told.documents == 20
  assert batch["segments"].max() == 2


def test_what_is_too_long_is_left_out_and_told(data, tmp_path):
  batch, told = batches(data(CHATS, Chats, seq_len=32), tmp_path)
  assert 0 < told.dropped == 20 - told.documents
  assert all(len(text) <= 32 for text, _ in segments(batch))
  prepared = corpus.prepare(data(CHATS, Chats, seq_len=32), tmp_path / "cache")
  assert f"{told.dropped} TOO LONG AND LEFT OUT" in str(prepared.report)


def test_nothing_left_is_refused(data, tmp_path):
  with pytest.raises(InputError, match=r"data.seq_len: all 20 conversations of"):
    batches(data(CHATS, Chats, seq_len=8), tmp_path)


@pytest.mark.parametrize(
  ("truncate", "kept"), [("end", b"question"), ("start", b"abab")]
)
def test_or_it_is_cut(data, tmp_path, truncate, kept):
  batch, told = batches(data(CHATS, Chats, seq_len=32, truncate=truncate), tmp_path)
  assert told.dropped == 0
  longest = max(segments(batch), key=lambda found: found[1].sum())
  assert len(longest[0]) == 32
  assert kept in longest[0]


def test_each_conversation_can_weigh_the_same(data, tmp_path):
  batch, _ = batches(data(CHATS, Chats, even=True), tmp_path)
  for _, weights in segments(batch):
    assert weights.sum() == pytest.approx(1)


def test_labels_stand_at_every_token(data, tmp_path):
  batch, told = batches(data(PAIRS, Labelled), tmp_path)
  assert told.documents == 40
  assert set(np.unique(batch["values"])) == {0.0, 1.0}
  assert batch["segments"].max() % 2 == 0


def test_text_and_chats_are_mixed_and_pairs_with_neither(data, tmp_path):
  chats, pairs = (data(CHATS, Chats).sources[0], Weighted(source=Preferences(path="x")))
  text = tmp_path / "text.jsonl"
  text.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(9)))
  plain = Weighted(source=Jsonl(path=str(text)), weight=2.0)
  mixed = Data(sources=(chats, plain), tokenizer=Bytes(), seq_len=64, batch=4)
  prepared = corpus.prepare(mixed, tmp_path / "cache")
  for row in (prepared.train[1][0], prepared.train[0][0]):
    assert set(row) == {"tokens", "segments", "weights"}
  with pytest.raises(InputError, match="cannot be mixed: some have 1 sequence"):
    Data(sources=(chats, pairs), tokenizer=Bytes(), seq_len=64, batch=4)


def test_a_pair_is_cut_alike_at_its_start(data, tmp_path):
  rows = [{"prompt": "p" * 30 + "?", "chosen": "yes" * 4, "rejected": "no"}] * 4
  batch, told = batches(data(rows, Preferences, truncate="start"), tmp_path)
  assert told.dropped == 0
  (chosen, _), (rejected, _) = list(segments(batch))[:2]
  assert chosen.index(b"?") == rejected.index(b"?") < 30


def test_an_answer_of_a_prompt_is_never_held_out_alone(data, tmp_path):
  spec = data(PAIRS, Labelled, held_out=0.4)
  source = dataclasses.replace(spec.sources[0].source, kl=False)
  spec = dataclasses.replace(spec, sources=(Weighted(source=source),))
  halves: dict[tuple[int, ...], set[str]] = {}
  for _, half, unit in examples.documents(spec, ByteTokenizer()):
    ids = unit.sequences[0].ids[: unit.sequences[0].supervised.index(True)]
    halves.setdefault(tuple(ids), set()).add(half)
  assert len(halves) == 20
  assert all(len(found) == 1 for found in halves.values())
