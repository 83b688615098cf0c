"""Signs of life, with real processes that do nothing else."""

import shutil
import signal
import subprocess
import sys
import time

import pytest

from jaxlm.launch import watch
from jaxlm.launch.watch import EXIT, Watch

PROGRAM = """
import pathlib, sys, time
from jaxlm.launch import watch
watch.BEAT_SECONDS, watch.LOST_SECONDS = 0.1, 1.0
me = watch.Watch(pathlib.Path(sys.argv[1]), int(sys.argv[2]), 3)
me.start()
print("up", flush=True)
time.sleep(float(sys.argv[3]))
me.stop()
"""


@pytest.fixture
def start(tmp_path):
  """Starts process i of three, for some seconds."""
  children = []

  def run(process, seconds):
    words = [sys.executable, "-c", PROGRAM, str(tmp_path / "x"), str(process)]
    child = subprocess.Popen(
      [*words, str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    children.append(child)
    return child

  yield run
  for child in children:
    child.kill()
    child.communicate()


def test_the_others_end_and_name_the_one_that_was_killed(start):
  children = [start(process, 60) for process in range(3)]
  for child in children:
    assert child.stdout.readline() == "up\n"
  began = time.monotonic()
  children[1].send_signal(signal.SIGKILL)
  for number in (0, 2):
    _, err = children[number].communicate(timeout=30)
    assert children[number].returncode == EXIT
    assert f"error: process {number} stops: process 1 on " in err
    assert "gave no sign for 1 s" in err
    assert "the same command goes on from the last checkpoint" in err
  assert time.monotonic() - began < 15


def test_one_that_never_begins_is_lost_too(start):
  children = [start(process, 60) for process in (0, 1)]
  for child in children:
    _, err = child.communicate(timeout=30)
    assert child.returncode == EXIT
    assert "process 2 on a host that never began" in err


def test_one_that_ends_as_it_should_is_not_missed(start):
  children = [start(process, 0.2 + 1.5 * process) for process in range(3)]
  for child in children:
    _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (0, "")


def test_waiting_for_a_loss_ends_without_one(tmp_path):
  alone = Watch(tmp_path / "x", 0, 1)
  assert alone.wait(0.3) is None


def test_a_folder_that_is_gone_is_made_again(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(watch, "BEAT_SECONDS", 0.02)
  alone = Watch(tmp_path / "x" / "1", 0, 1)
  alone.start()
  shutil.rmtree(tmp_path / "x")
  end = time.monotonic() + 10
  while not (tmp_path / "x" / "1" / "0").exists() and time.monotonic() < end:
    time.sleep(0.02)
  alone.stop()
  assert (tmp_path / "x" / "1" / "0").read_text().startswith("done")


def test_what_cannot_be_read_is_no_new_sign_and_told_once(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(watch, "LOST_SECONDS", 0.1)
  first = Watch(tmp_path, 0, 2)
  (tmp_path / "1").write_text("7.123 there")
  assert first.lost() is None
  (tmp_path / "1").unlink()
  (tmp_path / "1").mkdir()  # to read it is an OSError
  assert first.lost() is None
  time.sleep(0.2)
  assert "process 1 on there gave no sign" in str(first.lost())
  assert capsys.readouterr().err.count("signs of life cannot be") == 1


def test_what_cannot_be_written_ends_no_run_and_accuses_nobody(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(watch, "BEAT_SECONDS", 0.02)
  monkeypatch.setattr(watch, "LOST_SECONDS", 0.1)
  monkeypatch.setattr(watch, "give_up", lambda *told: accused.append(told))
  accused = []
  (tmp_path / "file").write_text("")
  first = Watch(tmp_path / "file" / "x", 0, 2)
  first.start()
  time.sleep(0.4)
  first.stop()
  assert not accused
  assert capsys.readouterr().err.count("signs of life cannot be") == 1
