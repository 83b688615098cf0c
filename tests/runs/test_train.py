"""A training run from the outside: what it leaves, says, and goes on from."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

from jaxlm import config
from jaxlm.__main__ import main
from jaxlm.runs import train
from jaxlm.trees import named_leaves
from runs import hooks
from runs.conftest import TINY


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
  """A run that is finished; its result."""
  with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
    patch.chdir(tmp_path_factory.mktemp("done"))
    return tiny(*SPOKEN).run("relative/run")


SPOKEN = ('samples.prompts=("ROMEO","")', "samples.tokens=8", "checkpoints.keep=2")


def test_what_a_run_leaves(done, tiny):
  names = {place.name for place in done.workdir.iterdir()}
  assert names == {
    "checkpoints", "config.json", "loss.png", "metrics.jsonl", "samples.txt",
    "tensorboard",
  }  # fmt: skip
  assert sorted(p.name for p in (done.workdir / "checkpoints").iterdir()) == [
    "00000008",
    "00000012",
  ]
  assert (
    (done.workdir / "samples.txt").read_text().startswith("--- sample 1 ---\nROMEO")
  )
  assert list((done.workdir / "tensorboard").iterdir())
  for file in ("config.json", "checkpoints/00000008/config.json"):
    assert config.from_json((done.workdir / file).read_text()) == tiny(*SPOKEN)
  assert (done.step, done.stopped) == (12, None)


def test_the_rows(done):
  training = [row for row in done.rows if "loss" in row]
  assert [row["step"] for row in training] == list(range(1, 13))
  assert training[-1]["loss"] < training[0]["loss"] - 1
  assert set(training[0]) == {
    "step", "loss", "nll", "accuracy", "padding", "grad_norm", "lr", "seconds",
    "tokens_per_second",
  }  # fmt: skip
  held_out = [row for row in done.rows if "held_out/bits_per_byte" in row]
  assert [row["step"] for row in held_out] == [6, 12]
  assert held_out[1]["held_out/bits_per_byte"] < held_out[0]["held_out/bits_per_byte"]


def test_the_result_is_the_average(done):
  """Loaded back, the checkpoint's average is what the notebook gets."""
  folder = done.workdir / "checkpoints/00000012"
  assert json.loads((folder / "data.json").read_text())["next_batch"] == 12
  leaves = hooks.leaves_of(folder)
  for name, leaf in named_leaves(done.params).items():
    np.testing.assert_array_equal(leaf, leaves[f"rest/ema/{name}"], strict=True)
    assert (leaves[f"params/{name}"] != leaf).any()


def test_a_finished_run_says_so_and_is_left_alone(done, tiny, capsys):
  def stands():
    return {p: os.stat(p).st_mtime_ns for p in walk(done.workdir)}

  before, begin = stands(), time.perf_counter()
  again = tiny(*SPOKEN).run(str(done.workdir))
  assert time.perf_counter() - begin < 5
  out = capsys.readouterr().out
  assert f"this run is finished: {done.workdir} is at step 12 of 12" in out
  assert "Held-out bits per byte: " in out
  assert "--config.steps= a larger number" in out
  assert "compiled" not in out
  assert stands() == before
  assert again.step == 12
  for a, b in zip(
    jax.tree.leaves(again.params), jax.tree.leaves(done.params), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  assert again.rows == done.rows


def walk(folder):
  for root, _, names in os.walk(folder):
    yield from (os.path.join(root, name) for name in names)


def test_fewer_steps_than_the_checkpoint_do_no_harm(done, tiny, capsys, copy):
  place = copy(done.workdir, newest=12)
  result = tiny(*SPOKEN, "steps=5").run(str(place))
  assert "is at step 12, past the 5 steps asked for" in capsys.readouterr().out
  assert result.step == 12
  assert len(result.rows) == len(done.rows)
  assert sorted(p.name for p in (place / "checkpoints").iterdir()) == [
    "00000008",
    "00000012",
  ]


def test_more_steps_go_on_and_say_that_the_schedule_moves(done, tiny, capsys, copy):
  place = copy(done.workdir, newest=12)
  result = tiny(*SPOKEN, "steps=14").run(str(place))
  out = capsys.readouterr().out
  assert "changed since this workdir was last run: steps: 12 -> 14" in out
  assert "going on from the checkpoint of step 12; learning rate 0.00" in out
  assert "the learning rate's schedule now ends at step 14" in out
  assert "finished: step 14" in out
  steps = [row["step"] for row in result.rows if "loss" in row]
  assert steps == list(range(1, 15))
  saved = (place / "checkpoints/00000014/config.json").read_text()
  assert config.from_json(saved) == tiny(*SPOKEN, "steps=14")


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(
  done, tiny, capsys, copy
):
  place = copy(done.workdir, newest=12)
  (place / "checkpoints/00000012/data.json").write_text("{}")
  result = tiny(*SPOKEN).run(str(place))
  out = capsys.readouterr().out
  assert "00000012 IS DAMAGED and is not used: data.json has other bytes" in out
  assert "going on from the checkpoint of step 8" in out
  times = train.metrics.TIMES
  bare = lambda rows: [  # noqa: E731
    {k: v for k, v in row.items() if k not in times} for row in rows
  ]
  assert bare(result.rows) == bare(done.rows)


def test_killed_before_the_first_checkpoint_it_begins_again(
  tiny, tmp_path, monkeypatch, done, capsys
):
  def killed(*args):
    raise SystemExit("killed")

  monkeypatch.setattr(train.Store, "save", killed)
  with pytest.raises(SystemExit):
    tiny(*SPOKEN).run(str(tmp_path / "run"))
  monkeypatch.undo()
  rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  assert len(rows) == 4
  result = tiny(*SPOKEN).run(str(tmp_path / "run"))
  assert "going on" not in capsys.readouterr().out
  assert [r["step"] for r in result.rows] == [r["step"] for r in done.rows]
  assert result.rows[-1]["held_out/nll"] == done.rows[-1]["held_out/nll"]


def test_no_held_out_text_and_no_samples(tiny, tmp_path, capsys):
  words = ("data.held_out=0", "data.cache=none", "checkpoints.every=99")
  result = tiny(*words).run(str(tmp_path / "r"))
  assert (
    "no row is held out (data.held_out=0.0): no evaluation" in capsys.readouterr().out
  )
  assert [row["step"] for row in result.rows if "loss" in row] == [*range(1, 13)]
  assert not (tmp_path / "r/samples.txt").exists()


def test_ctrl_c_saves_and_the_same_command_goes_on(
  text, cache, tmp_path, capsys, monkeypatch
):
  """A process of its own, through the command line."""
  workdir = tmp_path / "run"
  words = [
    f"--config={TINY}:text={text}",
    f"--config.data.cache={cache}",
    "--config.optimizer.lr=Constant(peak=0.01)",
    "--config.evaluate_every=100000",
    "--config.checkpoints.every=100000",
    f"--workdir={workdir}",
  ]
  process = subprocess.Popen(
    [sys.executable, "-m", "jaxlm", *words, "--config.steps=100000"],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_NUMPY_DTYPE_PROMOTION": "standard"},
  )
  for line in process.stdout:
    if line.startswith("step 7/100000"):
      process.send_signal(signal.SIGINT)
      break
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert err == ""
  (folder,) = (workdir / "checkpoints").iterdir()
  step = int(folder.name)
  assert step >= 7
  assert (
    f"stopped by Ctrl-C: step {step} of 100000 is saved in {workdir}. The same command "
    "goes on from there."
  ) in out

  monkeypatch.setattr(sys, "argv", ["jaxlm", *words, f"--config.steps={step + 3}"])
  with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
    main()
  assert not ended.value.code
  out = capsys.readouterr().out
  assert f"going on from the checkpoint of step {step}" in out
  assert f"finished: step {step + 3} in {workdir}" in out
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row["step"] for row in rows if "loss" in row] == list(range(1, step + 4))
