import gzip

import pytest
import zstandard

from jaxlm import files
from jaxlm.errors import InputError

TEXT = "Zürich, naïve, 東京\n"


@pytest.fixture
def folder(tmp_path):
  return files.path(str(tmp_path))


def test_paths_of_the_package_and_of_the_home(monkeypatch):
  assert files.path("jaxlm://corpora/SOURCES.md").exists()
  monkeypatch.setenv("HOME", "/nowhere")
  assert str(files.path("~/x")) == "/nowhere/x"


def test_find_a_file_and_a_pattern(folder):
  for name in ("b.txt", "a.txt", "c.md"):
    (folder / name).write_text("x")
  assert [file.name for file in files.find(folder / "*.txt", "f")] == ["a.txt", "b.txt"]
  assert files.find(str(folder / "c.md"), "f") == [folder / "c.md"]
  for missing in ("d.txt", "*.jsonl", ""):
    with pytest.raises(InputError, match=r"^data\.path: no file at "):
      files.find(folder / missing if missing else folder, "data.path")


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_compression_goes_by_the_name(folder, suffix):
  pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
  file = folder / f"x.txt{suffix}"
  file.write_bytes(pack[suffix](TEXT.encode()))
  assert files.read_text(file) == TEXT
  file.write_bytes(2 * file.read_bytes())
  assert files.read_text(file) == 2 * TEXT  # as `cat a.zst b.zst` makes them
  if suffix:
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match=rf"x\.txt{suffix}: not a whole {suffix} file"):
      files.read_bytes(file)
    file.write_bytes(TEXT.encode())
    with pytest.raises(InputError, match=r"not a whole"):
      files.read_bytes(file)


def test_a_pattern_may_stand_in_a_folder_and_names_files_alone(folder):
  for name in ("a/x.txt", "b/x.txt", "c/x.txt/y"):
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("x")
  found = files.find(folder / "*/x.txt", "f")
  assert found == [folder / "a/x.txt", folder / "b/x.txt"]


def test_text_that_is_not_utf_8_names_the_byte(folder):
  file = folder / "x.txt"
  file.write_bytes(b"abc\xff")
  with pytest.raises(InputError, match=r"x\.txt: byte 3 is not UTF-8"):
    files.read_text(file)


def test_json_lines(folder):
  file = folder / "x.jsonl"
  file.write_text('{"a": 1}\n\n[2]\n')
  assert list(files.read_jsonl(file)) == [(1, {"a": 1}), (3, [2])]
  file.write_text('{"a": 1}\n{"a"')
  with pytest.raises(InputError, match=r"x\.jsonl, line 2: not JSON"):
    list(files.read_jsonl(file))


def test_a_write_is_whole_or_leaves_no_trace(folder, monkeypatch):
  file = folder / "x.txt"
  files.write_atomic(file, "old")
  files.write_atomic(file, TEXT)
  assert file.read_text() == TEXT

  def fail(self, target):
    raise OSError("no space left on device")

  monkeypatch.setattr(type(file), "replace", fail)
  with pytest.raises(OSError, match="no space"):
    files.write_atomic(file, b"new")
  assert [each.name for each in folder.iterdir()] == ["x.txt"]
  assert file.read_text() == TEXT


def test_absolute_leaves_remote_paths(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert str(files.absolute("runs/x")) == str(tmp_path / "runs/x")
  assert str(files.absolute("gs://bucket/x")) == "gs://bucket/x"
