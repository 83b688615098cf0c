"""What each member of a pod does before and after its run; one process plays it."""

import types

import jax
import pytest

from jaxlm.errors import InputError
from jaxlm.launch import members, watch


class Ended(BaseException):
  """What stands for the end of this process."""


@pytest.fixture
def pod(monkeypatch):
  """This process believes that it is the first of several; returns its numbers."""
  numbers = iter(range(100, 200))
  several = types.SimpleNamespace(
    alone=lambda: False,
    first=lambda: True,
    meet=lambda place: None,
    from_first=lambda number: next(numbers),
  )
  monkeypatch.setattr(members, "processes", several)
  monkeypatch.setattr(members.pods, "start", lambda flag: None)
  monkeypatch.setattr(members.pods, "describe", lambda pod: "")

  def end(message, code):
    raise Ended(message, code)

  monkeypatch.setattr(members, "_end", end)
  monkeypatch.setattr(watch, "LOST_SECONDS", 0.2)
  monkeypatch.setattr(watch, "BEAT_SECONDS", 0.05)


def fail(error):
  def start(workdir):
    raise error

  return start


def test_nothing_in_a_workdir_is_deleted(pod, tmp_path):
  """It may be refused, or another start may live in it."""
  own = tmp_path / watch.SIGNS / "mine.txt"
  own.parent.mkdir()
  own.write_text("dear")

  def twice(workdir):
    assert (tmp_path / watch.SIGNS / "100" / "0").exists()
    members.run(lambda workdir: None, [workdir], "auto")
    assert (tmp_path / watch.SIGNS / "100" / "0").exists()

  members.run(twice, [str(tmp_path)], "auto")
  with pytest.raises(Ended, match="no run of jaxlm"):
    members.run(fail(InputError("no run of jaxlm")), [str(tmp_path)], "auto")
  assert own.read_text() == "dear"


def test_a_remote_workdir_is_refused_before_a_folder_is_made(pod, monkeypatch):
  monkeypatch.setattr(watch.Watch, "start", lambda self: pytest.fail("began to beat"))
  with pytest.raises(Ended, match=r"--workdir=gs://b/run: is remote") as ended:
    members.run(lambda workdir: None, ["gs://b/run"], "auto")
  assert ended.value.args[1] == 2


def test_an_error_of_the_runtime_with_nobody_lost_is_shown_whole(pod, tmp_path, capsys):
  error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
  with pytest.raises(Ended) as ended:
    members.run(fail(error), [str(tmp_path)], "auto")
  assert ended.value.args[1] == 1
  err = capsys.readouterr().err
  assert "Traceback" in err
  assert "RESOURCE_EXHAUSTED" in err


def test_an_error_of_the_runtime_because_one_is_lost_names_it(
  pod, tmp_path, monkeypatch
):
  def give_up(process, why):
    raise Ended(why, watch.EXIT)

  monkeypatch.setattr(watch, "give_up", give_up)
  monkeypatch.setattr(watch.Watch, "wait", lambda self, seconds: "process 1 is gone")
  with pytest.raises(Ended, match="process 1 is gone"):
    members.run(fail(jax.errors.JaxRuntimeError("gloo")), [str(tmp_path)], "auto")
