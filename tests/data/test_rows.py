import numpy as np
import pytest

from jaxlm.data import rows


def write(stem, documents, seq_len=4):
  writer = rows.Writer(stem, np.dtype(np.uint16))
  for document in documents:
    writer.append(document, size=10 * len(document))
  return writer.pack(seq_len)


def test_write_pack_and_load(tmp_path):
  counts = write(tmp_path / "x", [[1, 2, 3], [4, 5], [6, 7, 8, 9]])
  assert (counts.documents, counts.bytes, counts.tokens) == (3, 90, 6)
  loaded = rows.load(tmp_path / "x", counts.rows, seq_len=4)
  assert len(loaded) == counts.rows == 2
  assert [array.tolist() for array in loaded[0]] == [[6, 7, 8, 9, 0], [1, 1, 1, 1, 0]]
  assert [array.tolist() for array in loaded[1]] == [[1, 2, 3, 4, 5], [1, 1, 1, 2, 2]]
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
    with pytest.raises(ValueError, match=r"rows of shape \(1, 5\), not"):
      rows.load(tmp_path / "x", count, seq_len)
