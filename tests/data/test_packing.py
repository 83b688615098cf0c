import itertools
import math

import numpy as np
import pytest

from jaxlm.data import packing

LENGTHS = {
  "mixed": [5, 17, 2, 9, 40, 3, 3, 16, 33],
  "exact": [17, 33, 49],
  "one over": [18, 34],
  "too short to predict": [0, 1, 2],
  "one": [300],
  "none": [],
}


def pack(documents, seq_len, block=7):
  plan = packing.plan(np.array([len(d) for d in documents], np.int64), seq_len)
  blocks = list(
    packing.rows(
      plan,
      lambda index: {"tokens": np.array(documents[index])},
      {"tokens": np.dtype(int)},
      seq_len=seq_len,
      block=block,
    )
  )
  tokens, segments = ([b[name] for b in blocks] for name in ("tokens", "segments"))
  empty = [np.zeros((0, seq_len + 1), int)]
  return np.concatenate([*empty, *tokens]), np.concatenate([*empty, *segments])


def name_tokens(lengths):
  """Documents whose tokens all differ, so that each pair (input, target) is known."""
  stops = np.cumsum([0, *lengths])
  return [list(range(a + 1, b + 1)) for a, b in itertools.pairwise(stops)]


def predicted(documents, seq_len):
  """Returns the sorted (input, target) pairs of weight 1."""
  batch = packing.examples(*pack(documents, seq_len))
  chosen = batch["weights"] == 1
  pairs = zip(batch["tokens"][chosen], batch["targets"][chosen], strict=True)
  return sorted((int(a), int(b)) for a, b in pairs)


def expected(documents):
  return sorted(pair for d in documents for pair in itertools.pairwise(d))


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("seq_len", [1, 4, 16])
def test_every_token_but_the_first_is_predicted_once(lengths, seq_len):
  documents = name_tokens(lengths)
  assert predicted(documents, seq_len) == expected(documents)


@pytest.mark.parametrize("seed", range(8))
def test_the_same_on_random_documents(seed):
  rng = np.random.default_rng(seed)
  seq_len = int(rng.integers(1, 64))
  documents = name_tokens(rng.geometric(1 / 40, size=200))
  assert predicted(documents, seq_len) == expected(documents)


def test_no_target_crosses_a_segment_and_positions_count_from_its_start():
  rng = np.random.default_rng(0)
  documents = name_tokens(rng.integers(2, 60, size=150))
  document_of = np.zeros(sum(map(len, documents)) + 1, int)
  for index, document in enumerate(documents):
    document_of[document] = index + 1
  tokens, segments = pack(documents, 32)
  batch = packing.examples(tokens, segments)
  same = document_of[batch["tokens"]] == document_of[batch["targets"]]
  assert not (batch["weights"].astype(bool) & ~same).any()
  for row_tokens, row_segments, row_positions in zip(
    batch["tokens"], batch["segments"], batch["positions"], strict=True
  ):
    for segment in range(1, row_segments.max() + 1):
      (at,) = np.nonzero(row_segments == segment)
      assert len(at)
      assert at.tolist() == list(range(at[0], at[0] + len(at)))
      assert row_positions[at].tolist() == list(range(len(at)))
      assert len(set(document_of[row_tokens[at]])) == 1
    assert (row_tokens[row_segments == 0] == packing.PADDING).all()


def test_types_and_shapes():
  batch = packing.examples(*pack(name_tokens([9, 3]), 16))
  assert {name: array.dtype.name for name, array in batch.items()} == {
    "tokens": "int32",
    "targets": "int32",
    "segments": "int32",
    "positions": "int32",
    "weights": "float32",
  }
  assert {array.shape for array in batch.values()} == {(1, 16)}
  assert batch["segments"].tolist() == [[1] * 9 + [2] * 3 + [0] * 4]
  assert batch["positions"].tolist() == [[*range(9), *range(3), *range(4)]]
  assert batch["weights"].tolist() == [[1] * 8 + [0] + [1] * 2 + [0] * 5]


def test_the_plan_is_deterministic_and_blocks_change_nothing():
  documents = name_tokens(np.random.default_rng(3).integers(2, 99, size=300))
  one, other = pack(documents, 32, block=1), pack(documents, 32, block=1000)
  for a, b in zip(one, other, strict=True):
    np.testing.assert_array_equal(a, b)


def first_fit(lengths, capacity):
  """Rows that first fit needs, in the order of arrival."""
  rooms = []
  for length in lengths:
    index = next((i for i, room in enumerate(rooms) if room >= length), len(rooms))
    if index == len(rooms):
      rooms.append(capacity)
    rooms[index] -= length
  return len(rooms)


@pytest.mark.parametrize("seq_len", [64, 256])
def test_best_fit_packs_real_paragraphs_tightly(plays, seq_len):
  lengths = [len(part.encode()) + 2 for play in plays for part in play.split("\n\n")]
  plan = packing.plan(np.array(lengths), seq_len)
  used = int(plan.length.sum())
  least = math.ceil(used / (seq_len + 1))
  # Measured: 0.13% and 0.09% empty; first fit in order of arrival leaves 0.8%.
  assert 1 - used / (plan.rows * (seq_len + 1)) < 0.002
  arrival = np.lexsort((plan.start, plan.document))
  assert least <= plan.rows <= first_fit(plan.length[arrival], seq_len + 1)


def test_a_piece_goes_to_the_fullest_row_that_takes_it():
  plan = packing.plan(np.array([7, 8, 2]), 9)
  assert plan.document.tolist() == [1, 2, 0]
  assert plan.row.tolist() == [0, 0, 1]
  assert plan.offset.tolist() == [0, 8, 0]
