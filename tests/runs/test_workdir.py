"""Whose folder it is."""

import json
from dataclasses import dataclass, replace

import pytest
from etils import epath

from jaxlm import config
from jaxlm.errors import InputError
from jaxlm.runs import workdir
from jaxlm.runs.workdir import claim, explained, held


@dataclass(frozen=True, kw_only=True)
class Mesh:
  data: int = 1


@dataclass(frozen=True, kw_only=True)
class Run:
  steps: int = 10
  rate: float = 0.5
  mesh: Mesh = Mesh()


FREE = ("steps", "mesh")


@pytest.fixture
def place(tmp_path):
  return epath.Path(tmp_path / "new" / "run")


def with_a_row(place):
  (place / "metrics.jsonl").write_text('{"step": 1}\n')


def with_a_checkpoint(place):
  (place / "checkpoints/00000001").mkdir(parents=True)
  (place / "checkpoints/00000001/manifest.json").write_text("{}")


WORK = pytest.mark.parametrize("work", [with_a_row, with_a_checkpoint])


def test_a_new_folder_gets_the_config(place):
  assert claim(place, Run(), FREE) == []
  assert config.from_json((place / "config.json").read_text()) == Run()
  assert claim(place, Run(), FREE) == []


@WORK
def test_what_may_change_is_told_and_written(place, work):
  claim(place, Run(), FREE)
  work(place)
  changed = Run(steps=20, mesh=Mesh(data=2))
  assert claim(place, changed, FREE) == ["steps: 10 -> 20", "mesh.data: 1 -> 2"]
  assert config.from_json((place / "config.json").read_text()) == changed


@WORK
def test_another_run_is_refused_and_left_alone(place, work):
  claim(place, Run(), FREE)
  work(place)
  before = (place / "config.json").read_bytes()
  with pytest.raises(InputError) as caught:
    claim(place, Run(steps=20, rate=0.25), FREE)
  words = str(caught.value)
  assert words.startswith(f"--workdir={place}: holds another run")
  assert "  rate: 0.5 -> 0.25\n" in words
  assert "steps: 10" not in words
  assert "only steps, mesh may change" in words
  assert (place / "config.json").read_bytes() == before


def test_a_first_try_that_left_no_work_can_be_mended_in_place(place):
  """Such as a path to a corpus that is not there."""
  claim(place, Run(), FREE)
  (place / "data").mkdir()
  (place / "checkpoints/00000004").mkdir(parents=True)
  (place / "metrics.jsonl").write_text("")
  assert claim(place, Run(rate=0.25), FREE) == []
  assert config.from_json((place / "config.json").read_text()) == Run(rate=0.25)


def test_a_field_whose_name_begins_like_a_free_one_is_not_free():
  assert workdir._within("steps: 1 -> 2", "steps")
  assert workdir._within("mesh.data: 1 -> 2", "mesh")
  assert not workdir._within("meshes: 1 -> 2", "mesh")
  assert not workdir._within("a.mesh: 1 -> 2", "mesh")


def test_a_folder_of_other_files(tmp_path):
  (tmp_path / "thesis.tex").write_text("text")
  with pytest.raises(InputError, match=r"holds files and no config.json.*empty folder"):
    claim(epath.Path(tmp_path), Run(), FREE)
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "{", '{"type": "gone:Class"}'])
def test_a_config_that_cannot_be_read(place, text):
  claim(place, Run(), FREE)
  with_a_row(place)
  (place / "config.json").write_text(text)
  with pytest.raises(InputError, match=r"config.json: not a config that can be read"):
    claim(place, Run(), FREE)


def test_a_config_of_an_older_version_names_the_field(place):
  claim(place, Run(), FREE)
  with_a_row(place)
  data = json.loads((place / "config.json").read_text())
  del data["rate"]
  (place / "config.json").write_text(json.dumps(data))
  with pytest.raises(InputError, match=r"fields that the JSON lacks: rate: float"):
    claim(place, replace(Run(), rate=0.5), FREE)


def test_a_workdir_that_is_a_file(tmp_path):
  file = tmp_path / "file"
  file.write_text("text")
  with (
    pytest.raises(InputError, match=rf"{file}.*: .*Make room or give another path"),
    explained(epath.Path(file)),
  ):
    claim(epath.Path(file), Run(), FREE)
  assert file.read_text() == "text"


def test_a_full_disk_is_explained_and_a_bug_is_not(tmp_path):
  with pytest.raises(InputError, match=rf"{tmp_path}: No space left"):  # noqa: SIM117
    with explained(epath.Path(tmp_path)):
      raise OSError(28, "No space left on device")
  with pytest.raises(FileNotFoundError), explained(epath.Path(tmp_path)):
    (tmp_path / "none").read_text()


def test_a_folder_is_held_by_one_process(place):
  with (
    held(place),
    pytest.raises(InputError, match="another process is running in it"),
    held(place),
  ):
    pass
  with held(place):
    pass
  with pytest.raises(InputError, match="is remote"), held(epath.Path("gs://b/x")):
    pass
