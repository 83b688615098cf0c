import numpy as np
import pytest

from jaxlm.data import rows


def write(stem, documents, seq_len=4):
  writer = rows.Writer(stem, {"tokens": np.dtype(np.uint16)})
  for document in documents:
    fields = {"tokens": np.array(document)}
    writer.append(fields, size=10 * len(document), predicted=len(document) - 1)
  return writer.pack(seq_len, most=None, sequences=1, dropped=0)


def listed(row):
  return row["tokens"].tolist(), row["segments"].tolist()


def test_write_pack_and_load(tmp_path):
  counts = write(tmp_path / "x", [[1, 2, 3], [4, 5], [6, 7, 8, 9]])
  assert (counts.documents, counts.bytes, counts.tokens) == (3, 90, 6)
  loaded = rows.load(tmp_path / "x", counts.rows, seq_len=4)
  assert len(loaded) == counts.rows == 2
  assert listed(loaded[0]) == ([6, 7, 8, 9, 0], [1, 1, 1, 1, 0])
  assert listed(loaded[1]) == ([1, 2, 3, 4, 5], [1, 1, 1, 2, 2])
  assert loaded.tokens_NT.dtype == np.uint16
  assert loaded.segments_NT.dtype == np.uint8
  assert sorted(f.name for f in tmp_path.iterdir()) == [
    "x.segments.npy",
    "x.tokens.npy",
  ]


def test_many_pieces_in_a_row_are_numbered_without_wrapping(tmp_path):
  counts = write(tmp_path / "x", [[1, 2]] * 300, seq_len=599)
  loaded = rows.load(tmp_path / "x", counts.rows, seq_len=599)
  assert loaded.segments_NT.max() == 300


def test_nothing_at_all(tmp_path):
  counts = write(tmp_path / "x", [])
  assert (counts.documents, counts.rows) == (0, 0)
  assert len(rows.load(tmp_path / "x", 0, seq_len=4)) == 0


def test_rows_of_another_shape(tmp_path):
  counts = write(tmp_path / "x", [[1, 2, 3]])
  for count, seq_len in ((counts.rows + 1, 4), (counts.rows, 5)):
    with pytest.raises(ValueError, match=r"tokens of shape \(1, 5\), not"):
      rows.load(tmp_path / "x", count, seq_len)


def test_pairs_share_rows_and_keep_their_fields(tmp_path):
  """Two sequences an example, at most two examples a row, the last place empty."""
  dtypes = {
    "tokens": np.dtype(np.uint16),
    "weights": np.dtype(np.float32),
    "part": np.dtype(np.uint8),
  }
  writer = rows.Writer(tmp_path / "x", dtypes)
  for first in (1, 11, 21):
    fields = {
      "tokens": np.arange(first, first + 4),
      "weights": np.array([0, 1, 0, 0.5]),
      "part": np.array([0, 0, 1, 1]),
    }
    writer.append(fields, size=4, predicted=2)
  counts = writer.pack(12, most=2, sequences=2, dropped=1)
  assert (counts.rows, counts.tokens, counts.dropped) == (2, 6, 1)
  loaded = rows.load(tmp_path / "x", 2, 12, ("weights",))
  tokens, segments = listed(loaded[0])
  assert tokens == [1, 2, 3, 4, 11, 12, 13, 14, 0, 0, 0, 0, 0]
  assert segments == [1, 1, 2, 2, 3, 3, 4, 4, 0, 0, 0, 0, 0]
  assert loaded[0]["weights"].tolist() == [0, 1, 0, 0.5] * 2 + [0] * 5
  assert listed(loaded[1])[0][:5] == [21, 22, 23, 24, 0]
