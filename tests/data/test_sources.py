import gzip
import json

import numpy as np
import pytest
import zstandard
from array_record.python import array_record_module

from jaxlm.data import sources
from jaxlm.errors import InputError

FIELD = "data.sources.0.source"


def read(source, vocab=258):
  return list(sources.read(source, FIELD, vocab))


def texts(source):
  return [document.content for document in read(source)]


def texts_of(path):
  return texts(sources.ArrayRecord(path=path))


def write_records(file, records):
  writer = array_record_module.ArrayRecordWriter(str(file), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()
  return str(file)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_text_plain_and_compressed(tmp_path, pack):
  suffix = {bytes: "", gzip.compress: ".gz"}.get(pack, ".zst")
  for name, text in (("b", "second \u00e9\n"), ("a", "first"), ("c", "")):
    (tmp_path / f"{name}.txt{suffix}").write_bytes(pack(text.encode()))
  found = read(sources.Text(path=f"{tmp_path}/*.txt{suffix}", documents="file"))
  assert [document.content for document in found] == ["first", "second \u00e9\n"]
  assert found[0].where == f"{tmp_path}/a.txt{suffix}"


def test_paragraphs_and_lines(tmp_path):
  file = tmp_path / "x.txt"
  file.write_bytes(b"\n\none\ntwo\n\n  \n\n  three\r\n\r\nfour\n\n")
  paragraphs = sources.Text(path=str(file), documents="paragraphs")
  assert texts(paragraphs) == ["one\ntwo", "  three", "four"]
  found = read(sources.Text(path=str(file), documents="lines"))
  assert [d.content for d in found] == ["one", "two", "  ", "  three", "four"]
  assert found[0].where == f"{file}, line 3"


def test_jsonl(tmp_path):
  file = tmp_path / "x.jsonl"
  file.write_text('{"body": "a\\nb", "n": 1}\n\n{"body": ""}\n{"body": "c"}')
  found = read(sources.Jsonl(path=str(file), field="body"))
  assert [document.content for document in found] == ["a\nb", "c"]
  assert found[1].where == f"{file}, line 4"


def test_the_corpus_that_ships():
  path = "jaxlm://corpora/shakespeare.jsonl.gz"
  found = texts(sources.Jsonl(path=path))
  assert len(found) == 780
  assert "To be, or not to be" in "".join(found)


def test_array_record(tmp_path):
  path = write_records(tmp_path / "a.arrayrecord", [b"one", "zw\u00f6lf".encode()])
  assert texts(sources.ArrayRecord(path=path)) == ["one", "zw\u00f6lf"]
  rows = [json.dumps({"t": "x"}).encode()]
  path = write_records(tmp_path / "b.arrayrecord", rows)
  assert texts(sources.ArrayRecord(path=path, field="t")) == ["x"]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
@pytest.mark.parametrize("suffix", [".bin", ".npy", ".bin.gz"])
def test_token_ids(tmp_path, dtype, suffix):
  ids = np.array([0, 5, 6, 0, 0, 7, 200], dtype)
  file = tmp_path / f"x{suffix}"
  if suffix == ".npy":
    np.save(file, ids)
  else:
    data = ids.tobytes()
    file.write_bytes(gzip.compress(data) if suffix == ".bin.gz" else data)
  found = read(sources.TokenIds(path=str(file), dtype=dtype, end=0))
  assert [document.content.tolist() for document in found] == [[5, 6], [7, 200]]
  assert found[1].where == f"{file}, token 5"


def test_an_end_beyond_the_vocabulary_is_fine(tmp_path):
  (tmp_path / "x.bin").write_bytes(np.array([1, 999, 2], "<u2").tobytes())
  source = sources.TokenIds(path=f"{tmp_path}/x.bin", dtype="uint16", end=999)
  assert [document.content.tolist() for document in read(source)] == [[1], [2]]


@pytest.mark.parametrize(("value", "dtype"), [(300, "uint16"), (-3, "int32")])
def test_a_token_id_that_the_vocabulary_lacks(tmp_path, value, dtype):
  file = tmp_path / "x.bin"
  file.write_bytes(np.array([1, 2, value], dtype).tobytes())
  source = sources.TokenIds(path=str(file), dtype=dtype, end=0)
  with pytest.raises(InputError, match=rf"x\.bin, token 2: the id {value} .* 258"):
    read(source)


def test_token_files_of_another_shape(tmp_path):
  (tmp_path / "x.bin").write_bytes(b"12345")
  np.save(tmp_path / "wide.npy", np.zeros((2, 2), np.uint16))
  np.save(tmp_path / "long.npy", np.zeros(2, np.int64))
  (tmp_path / "junk.npy").write_bytes(b"junk")
  for name, told in (
    ("x.bin", "5 bytes are not a whole number of uint16"),
    ("wide.npy", r"uint16 of shape \(2, 2\)"),
    ("long.npy", "holds int64"),
    ("junk.npy", "not a .npy file"),
  ):
    source = sources.TokenIds(path=f"{tmp_path}/{name}", dtype="uint16", end=0)
    with pytest.raises(InputError, match=rf"{name}: .*{told}|{name}: {told}"):
      read(source)


def test_a_missing_path():
  with pytest.raises(InputError, match=r"data\.sources\.0\.source\.path: .*/nowhere"):
    read(sources.Jsonl(path="/nowhere/*.jsonl"))


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_an_empty_corpus(tmp_path, content):
  file = tmp_path / "x.jsonl"
  file.write_text(content)
  with pytest.raises(InputError, match=r"source\.path: no document in .*x\.jsonl"):
    read(sources.Jsonl(path=str(file)))


@pytest.mark.parametrize(
  ("row", "told"),
  [
    ('{"txet": "a", "id": 1}', "no field 'text'; the row has 'txet', 'id'. Did you m"),
    ("{}", "no field 'text'; the row has none"),
    ('["a"]', "a JSON object is needed, not a list"),
    ('{"text": 3}', "the field 'text' is a int"),
    ('{"text": "ab\\ud800"}', "letter 2 of 'text' is half of a surrogate"),
    ('{"text": ', "not JSON"),
  ],
)
def test_a_bad_row(tmp_path, row, told):
  file = tmp_path / "x.jsonl"
  file.write_text('{"text": "fine"}\n\n' + row)
  with pytest.raises(InputError, match=rf"x\.jsonl, line 3: {told}"):
    read(sources.Jsonl(path=str(file)))


def test_bytes_that_are_not_text(tmp_path):
  for name in ("x.txt", "x.jsonl"):
    (tmp_path / name).write_bytes(b"fine \xff")
  for source in (
    sources.Text(path=f"{tmp_path}/x.txt", documents="file"),
    sources.Jsonl(path=f"{tmp_path}/x.jsonl"),
  ):
    with pytest.raises(InputError, match=r"x\.\w+: byte 5 is not UTF-8"):
      read(source)
  path = write_records(tmp_path / "x.arrayrecord", [b"fine", b"no\xff"])
  with pytest.raises(InputError, match="record 1: byte 2 is not UTF-8"):
    read(sources.ArrayRecord(path=path))


def test_bad_array_records(tmp_path):
  file = tmp_path / "x.arrayrecord"
  file.write_bytes(b"no such thing\n" * 1000)
  with pytest.raises(InputError, match=r"x\.arrayrecord: not a whole ArrayRecord"):
    read(sources.ArrayRecord(path=str(file)))
  path = write_records(tmp_path / "y.arrayrecord", [b'{"a": "b"}'])
  with pytest.raises(InputError, match=r"record 0: no field 'text'; the row has 'a'"):
    read(sources.ArrayRecord(path=path, field="text"))
  path = write_records(tmp_path / "z.arrayrecord", [b"text"])
  with pytest.raises(InputError, match="record 0: not JSON"):
    read(sources.ArrayRecord(path=path, field="text"))


def test_a_cut_array_record(tmp_path):
  rng = np.random.default_rng(0)
  texts = [rng.integers(97, 123, 900, np.uint8).tobytes() for _ in range(600)]
  path = write_records(tmp_path / "x.arrayrecord", texts)
  assert [text.encode() for text in texts_of(path)] == texts
  data = bytearray((tmp_path / "x.arrayrecord").read_bytes())
  data[len(data) // 2] ^= 255
  (tmp_path / "flipped.arrayrecord").write_bytes(data)
  (tmp_path / "cut.arrayrecord").write_bytes(data[: len(data) // 2])
  for name in ("flipped", "cut"):
    with pytest.raises(InputError, match=rf"{name}\.arrayrecord: not a whole"):
      texts_of(f"{tmp_path}/{name}.arrayrecord")


def test_a_cut_gzip(tmp_path):
  file = tmp_path / "x.txt.gz"
  file.write_bytes(gzip.compress(b"text " * 99)[:-9])
  with pytest.raises(InputError, match=r"x\.txt\.gz: not a whole \.gz"):
    read(sources.Text(path=str(file), documents="file"))


def test_spec_names_the_field():
  with pytest.raises(InputError, match=r"source\.end: -1"):
    sources.TokenIds(path="x", dtype="int32", end=-1)
