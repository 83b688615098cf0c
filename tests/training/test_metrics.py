"""metrics.jsonl, TensorBoard's events, the picture and the progress bar."""

import json
import os
import struct
import sys

import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from jaxlm.errors import InputError
from jaxlm.training import metrics
from jaxlm.training.metrics import Writer


@pytest.fixture
def workdir(tmp_path):
  return epath.Path(tmp_path)


def write(workdir, steps, *, start=0):
  with Writer(workdir, start=start, total=9) as writer:
    for step in steps:
      writer.write(step, {"loss": step / 10, "note": "text"})


def events(workdir):
  """[(step, {tag: value} or "start")] of all files, in order of their first event."""
  found = []
  for file in sorted((workdir / "tensorboard").iterdir(), key=os.path.getmtime):
    data, at = file.read_bytes(), 0
    while at < len(data):
      (size,) = struct.unpack_from("<Q", data, at)
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
      at += 12 + size + 4
      if event.HasField("session_log"):
        found.append((event.step, "start"))
      elif event.HasField("summary"):
        values = {v.tag: round(v.simple_value, 6) for v in event.summary.value}
        found.append((event.step, values))
  return found


def test_rows_and_events(workdir):
  write(workdir, [1, 2])
  rows = [{"step": 1, "loss": 0.1, "note": "text"}, {"step": 2, "loss": 0.2}]
  rows[1]["note"] = "text"
  assert metrics.read(workdir) == rows
  assert events(workdir) == [(1, "start"), (1, {"loss": 0.1}), (2, {"loss": 0.2})]


def test_resuming_drops_rows_past_the_step_and_a_torn_line(workdir, monkeypatch):
  write(workdir, [1, 2, 3, 4])
  file = workdir / "metrics.jsonl"
  file.write_text(file.read_text() + '{"step": 5, "lo')
  monkeypatch.setattr(metrics.time, "time", lambda: 2e9)  # another event file
  write(workdir, [3, 4], start=2)
  assert [row["step"] for row in metrics.read(workdir)] == [1, 2, 3, 4]
  assert file.read_text().count("\n") == 4
  # TensorBoard drops what earlier files hold from the step of "start" on.
  assert (3, "start") in events(workdir)
  assert len(list((workdir / "tensorboard").iterdir())) == 2


def test_from_the_first_step_all_rows_go(workdir):
  """A run killed before its first checkpoint begins again."""
  write(workdir, [1, 2])
  write(workdir, [1], start=0)
  assert [row["step"] for row in metrics.read(workdir)] == [1]


def test_rows_are_on_disk_as_soon_as_they_are_written(workdir):
  with Writer(workdir, start=0, total=9) as writer:
    writer.write(1, {"loss": 0.5})
    assert metrics.read(workdir) == [{"step": 1, "loss": 0.5}]


def test_no_file_has_no_rows(workdir):
  assert metrics.read(workdir) == []


def test_a_spoilt_line_is_named(workdir):
  (workdir / "metrics.jsonl").write_text('{"step": 1}\nspoilt\n{"step": 2}\n')
  with pytest.raises(
    InputError, match=r"metrics.jsonl, line 2: not JSON .*Delete this"
  ):
    metrics.read(workdir)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk(workdir):
  """The device takes no byte; the first row tells, and closing tells nothing else."""
  writer = Writer(workdir, start=0, total=9)
  writer._lines.close()
  writer._lines = epath.Path("/dev/full").open("a")
  words = rf"{workdir}/metrics.jsonl: cannot be written \(No space left on device\)"
  with pytest.raises(InputError, match=words), writer:
    writer.write(1, {"loss": 1.0})


def test_a_folder_that_cannot_be_written(workdir):
  (workdir / "tensorboard").write_text("a file is in the way")
  with pytest.raises(InputError, match=r"metrics.jsonl: cannot be written .*the same"):
    Writer(workdir, start=0, total=9)


def test_without_a_terminal_a_line_is_printed_for_each_row(workdir, capsys):
  with Writer(workdir, start=0, total=9) as writer:
    writer.progress(1, {"loss": 1.23456, "tok/s": 12345.6}, False)
    writer.progress(2, {"loss": 1.23456, "tok/s": 12345.6}, True)
  captured = capsys.readouterr()
  assert captured.out == "step 2/9  loss 1.235  tok/s 12,346\n"
  assert captured.err == ""


def test_the_bar_is_closed_before_an_error_is_told(workdir, capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
  with pytest.raises(InputError), Writer(workdir, start=3, total=9) as writer:  # noqa: PT012
    writer.progress(4, {"loss": 1.0}, True)
    writer.say("a line above")
    raise InputError("bad")
  print("error: bad", file=sys.stderr)
  captured = capsys.readouterr()
  assert captured.out == "a line above\n"
  assert "4/9" in captured.err
  assert "loss 1" in captured.err
  assert captured.err.endswith("\nerror: bad\n")


def test_the_picture(workdir):
  rows = [{"step": s, "loss": 5.0 / s} for s in range(1, 9)]
  rows += [{"step": s, "held_out/bits_per_byte": 3.0 / s} for s in (4, 8)]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (workdir / "metrics.jsonl").write_text(text)
  metrics.plot(workdir)
  data = (workdir / "loss.png").read_bytes()
  assert data.startswith(b"\x89PNG")
  assert len(data) > 5000


def test_there_is_no_picture_of_nothing(workdir):
  metrics.plot(workdir)
  assert not (workdir / "loss.png").exists()
