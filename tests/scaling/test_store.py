"""Rows on disk."""

import pytest

from jaxlm.errors import InputError
from jaxlm.scaling.store import Store

A, B = "0" * 15 + "a", "0" * 15 + "b"


def test_rows_come_back_the_smallest_compute_first(tmp_path):
  store = Store(tmp_path / "rows")
  assert store.rows() == []
  assert store.row(A) is None
  store.add(A, {"flops": {"causal": 2.0}, "loss": 1.5})
  store.add(B, {"flops": {"causal": 1.0}, "loss": None})
  assert [row["key"] for row in store.rows()] == [B, A]
  assert store.row(A) == {"key": A, "flops": {"causal": 2.0}, "loss": 1.5}
  assert {place.name for place in (tmp_path / "rows").iterdir()} == {
    f"{A}.json", f"{B}.json",
  }  # fmt: skip


@pytest.mark.parametrize("text", ["{", "[]", '{"key": "other", "flops": {}}', "{}"])
def test_a_file_that_is_no_row_is_named(tmp_path, text):
  (tmp_path / f"{A}.json").write_text(text)
  with pytest.raises(InputError, match=rf"{A}\.json: not a row.*done again"):
    Store(tmp_path).row(A)


def test_a_key_is_a_hash(tmp_path):
  with pytest.raises(InputError, match="16 hexadecimal digits"):
    Store(tmp_path).add("../x", {})


def test_what_json_cannot_say_is_refused(tmp_path):
  with pytest.raises(ValueError, match="JSON compliant"):
    Store(tmp_path).add(A, {"flops": {"causal": float("nan")}})
  assert Store(tmp_path).rows() == []
