"""Each kind of bad input: one clear error that names field or path, and a remedy."""

import gzip
import os
import pathlib
import re
import shutil
import sys

import jax
import pytest
from absl.testing import flagsaver

from jaxlm import config
from jaxlm.__main__ import main
from jaxlm.errors import InputError
from jaxlm.runs import train
from runs.conftest import TINY


def refusal(cfg, workdir):
  """The message of a run that refuses its input; nothing is left that was not there."""
  with pytest.raises(InputError) as caught:
    cfg.run(str(workdir))
  return str(caught.value)


@pytest.fixture
def command(text, cache, monkeypatch, capsys):
  """Runs the command line in this process; returns (exit code, stdout, stderr)."""

  def call(*words):
    line = ["jaxlm", f"--config={TINY}:text={text}", f"--config.data.cache={cache}"]
    monkeypatch.setattr(sys, "argv", [*line, *words])
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
      main()
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err

  return call


def assert_one_error(code, err, *parts):
  assert code == 2
  assert err.startswith("error: ")
  assert err.count("error: ") == 1
  assert "Traceback" not in err
  for part in parts:
    assert part in err


def test_a_misspelt_field(command, tmp_path):
  code, _, err = command("--config.optimizer.lr.peek=1", f"--workdir={tmp_path}/a")
  assert_one_error(code, err, "optimizer.lr.peek", "WarmupCosine has no 'peek'")
  assert "Did you mean 'peak'?" in err
  assert not (tmp_path / "a").exists()


def test_a_wrong_type(command, tmp_path):
  code, _, err = command("--config.steps=many", f"--workdir={tmp_path}/a")
  assert_one_error(code, err, "steps: cannot read 'many' as int")


def test_a_value_out_of_range(command, tmp_path):
  code, _, err = command("--config.steps=0", f"--workdir={tmp_path}/a")
  assert_one_error(code, err, "steps: 0 is under 1")


def test_a_missing_corpus_and_its_mending_in_the_same_workdir(command, text, tmp_path):
  missing = f"--config.data.sources.0.source.path={tmp_path}/none.jsonl"
  code, _, err = command(missing, f"--workdir={tmp_path}/a")
  assert_one_error(
    code, err, "data.sources.0.source.path", f"no file at '{tmp_path}/none.jsonl'"
  )
  code, _, _ = command("--config.steps=4", f"--workdir={tmp_path}/a")
  assert code == 0


def test_an_empty_corpus(tiny, tmp_path):
  (tmp_path / "empty.jsonl").write_text("")
  cfg = tiny(f"data.sources.0.source.path={tmp_path}/empty.jsonl")
  words = refusal(cfg, tmp_path / "a")
  assert "empty.jsonl" in words
  assert re.search(r"no (text|document)|empty", words.replace("empty.jsonl", ""))


def test_bytes_that_are_no_text(tiny, tmp_path):
  (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
  cfg = tiny(f"data.sources.0.source.path={tmp_path}/latin.jsonl")
  words = refusal(cfg, tmp_path / "a")
  assert f"{tmp_path}/latin.jsonl" in words
  assert "byte 13 is not UTF-8" in words
  assert "iconv" in words


def test_a_torn_archive(tiny, tmp_path):
  whole = gzip.compress(b'{"text": "a long enough text"}\n')
  (tmp_path / "torn.jsonl.gz").write_bytes(whole[:-9])
  cfg = tiny(f"data.sources.0.source.path={tmp_path}/torn.jsonl.gz")
  assert "torn.jsonl.gz: not a whole .gz file" in refusal(cfg, tmp_path / "a")


def test_a_batch_that_the_mesh_does_not_divide(tiny, tmp_path):
  words = refusal(tiny("data.batch=12"), tmp_path / "a")
  assert "data.batch: 12 rows do not divide by 8" in words
  assert "Use a multiple of 8, or a smaller mesh axis" in words
  words = refusal(tiny("accumulate=2"), tmp_path / "a")
  assert "data.batch: 8 rows do not divide by 16" in words
  assert "accumulate=2" in words
  assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
  ("mesh", "parts"),
  [
    (["mesh.fsdp=4"], ["mesh (fsdp=4): needs 4 devices and 8 are here", "-1"]),
    (["mesh.tensor=3"], ["8 devices do not divide by 3"]),
    (["mesh.fsdp=16"], ["needs 16 devices and 8 are here"]),
  ],
)
def test_a_mesh_that_the_devices_do_not_fill(tiny, tmp_path, mesh, parts):
  words = refusal(tiny(*mesh), tmp_path / "a")
  for part in parts:
    assert part in words
  assert not (tmp_path / "a").exists()


def test_a_mesh_that_a_parameter_does_not_divide_by(tiny, tmp_path):
  cfg = tiny("mesh.fsdp=1", "mesh.tensor=8")
  words = refusal(cfg, tmp_path / "a")
  assert "mesh: dimension 4 of layers/0/mixer/" in words
  assert "does not divide by 8" in words


def test_parameters_that_no_axis_splits(tiny, tmp_path):
  words = refusal(tiny("sharding.embed=()"), tmp_path / "a")
  assert "of the parameter bytes beyond its part; at most 2% may be" in words


def test_a_model_with_fewer_ids_than_the_tokenizer(tiny, tmp_path):
  words = refusal(tiny("model.vocab=256"), tmp_path / "a")
  assert "model.vocab: 256 ids are fewer than the tokenizer's 258" in words
  tiny("steps=4").run(str(tmp_path / "a"))


def test_a_warmup_longer_than_the_run(tiny, tmp_path):
  words = refusal(tiny("optimizer.lr.warmup=13"), tmp_path / "a")
  assert "optimizer.lr.warmup: 13 is not within the run's 12 steps" in words


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("done") / "run"
  with jax.numpy_dtype_promotion("standard"):
    tiny("steps=4").run(str(workdir))
  return workdir


def test_a_workdir_that_holds_another_run(done, command):
  before = (done / "config.json").read_bytes()
  code, _, err = command(
    f"--workdir={done}", "--config.steps=4", "--config.optimizer.lr.peak=1"
  )
  assert_one_error(code, err, f"--workdir={done}: holds another run")
  assert "  optimizer.lr.peak: 0.01 -> 1.0\n" in err
  assert "Give another --workdir, or these values back" in err
  assert (done / "config.json").read_bytes() == before


def test_a_workdir_of_other_files(tmp_path, command):
  (tmp_path / "thesis.tex").write_text("text")
  code, _, err = command(f"--workdir={tmp_path}")
  assert_one_error(code, err, f"--workdir={tmp_path}: holds files and no config.json")
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_checkpoint_of_another_model(done, tiny, tmp_path):
  """Checkpoints that were copied into the folder of another run."""
  place = tmp_path / "run"
  shutil.copytree(done, place)
  wider = tiny("steps=4", "model.pattern.0.mlp.hidden=128")
  (place / "config.json").write_text(config.to_json(wider))
  words = refusal(wider, place)
  assert f"{place}/checkpoints/00000004: a checkpoint of another model" in words
  assert "'layers/0/mlp/down' is (2, 64, 32) there and (2, 128, 32) in this" in words
  assert "another --workdir" in words


def test_no_whole_checkpoint(done, tiny, tmp_path):
  place = tmp_path / "run"
  shutil.copytree(done, place)
  for folder in (place / "checkpoints").iterdir():
    (folder / "data.json").write_text("{}")
  words = refusal(tiny("steps=4"), place)
  assert "no checkpoint of [4] is whole" in words
  assert (place / "checkpoints/00000004/arrays").exists()


def test_a_full_disk_for_a_checkpoint(tiny, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
  words = refusal(tiny("steps=4"), tmp_path / "a")
  assert f"{tmp_path}/a/checkpoints: a checkpoint needs up to" in words
  assert "Free some space" in words
  monkeypatch.undo()
  assert tiny("steps=4").run(str(tmp_path / "a")).step == 4


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_for_the_metrics(tmp_path, command, monkeypatch):
  """The rows go to a device that takes no byte."""

  class Full(train.metrics.Writer):
    def __init__(self, *args, **options):
      super().__init__(*args, **options)
      self._lines.close()
      self._lines = open("/dev/full", "a")  # noqa: SIM115

  monkeypatch.setattr(train.metrics, "Writer", Full)
  code, _, err = command(f"--workdir={tmp_path}/a", "--config.steps=4")
  assert_one_error(
    code, err, f"{tmp_path}/a/metrics.jsonl: cannot be written (No space left on device"
  )
  assert "goes on from the newest checkpoint" in err


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path):
  """Nothing of it is saved, though a checkpoint is due at every step."""
  cfg = tiny("optimizer=Lion(lr=Constant(peak=1e30),clip=none)", "checkpoints.every=1")
  words = refusal(cfg, tmp_path / "a")
  found = re.match(r"step (\d+): (loss|grad_norm) is (nan|inf)", words)
  assert found, words
  step = int(found[1])
  assert step >= 2
  assert "Lower optimizer.lr.peak" in words
  folders = [int(p.name) for p in (tmp_path / "a/checkpoints").iterdir()]
  assert max(folders) < step
  rows = train.metrics.read(train.files.path(str(tmp_path / "a")))
  assert max(row["step"] for row in rows) < step


def test_other_text_than_the_checkpoint_was_trained_on(tiny, text, tmp_path):
  mine = tmp_path / "mine.jsonl"
  mine.write_text(pathlib.Path(text).read_text())
  parts = (f"data.sources.0.source.path={mine}", "steps=4")
  tiny(*parts).run(tmp_path / "a")
  with mine.open("a") as file:
    file.write('{"text": "one more document"}\n')
  words = refusal(tiny(*parts, "steps=8"), tmp_path / "a")
  assert "mine.jsonl" in words
  assert "is not what step 4 was trained on" in words
