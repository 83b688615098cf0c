"""Two and four real processes: the same run, on other meshes, after losses.

Each start costs some ten seconds, so one start serves several claims.
"""

import contextlib
import io
import json
import pathlib
import shutil
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest

from jaxlm import config
from jaxlm.launch import local
from jaxlm.posttrain import objectives
from jaxlm.training.checkpoints import steps_in
from jaxlm.training.metrics import read
from runs import hooks
from runs.conftest import TINY

HOOKS = pathlib.Path(hooks.__file__)
STEPS = 12


def losses(workdir):
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return {row["step"]: row["loss"] for row in rows if "loss" in row}


def command(workdir, text, cache, hook, *overrides):
  """The command line of each process, with what the hooks shall do."""
  record = workdir.with_name(f"{workdir.name}.record")
  return [
    sys.executable, str(HOOKS), f"record={record}", *hook, "--",
    f"--config={TINY}:text={text}", f"--workdir={workdir}",
    f"--config.data.cache={cache}",
    *(f"--config.{override}" for override in overrides),
  ]  # fmt: skip


@pytest.fixture(scope="module")
def start(text, tmp_path_factory):
  """Runs the tiny config in some processes; returns (exit code, seconds)."""
  cache = tmp_path_factory.mktemp("rows")

  def run(workdir, processes, devices, *overrides, hook=()):
    words = command(workdir, text, cache, hook, *overrides)
    began = time.monotonic()
    code = local.run(words, processes, devices)
    return code, time.monotonic() - began

  with pytest.MonkeyPatch.context() as patch:
    for name in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION"):
      patch.delenv(name)
    yield run


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
  """A run of two processes with two devices each that nothing disturbs."""
  workdir = tmp_path_factory.mktemp("whole") / "w"
  assert start(workdir, 2, 2, "samples.prompts=x", "samples.tokens=4")[0] == 0
  return workdir


@pytest.fixture(scope="module")
def killed(start, tmp_path_factory):
  """(exit code, stderr, workdir) of such a run that lost a process after step 4."""
  workdir = tmp_path_factory.mktemp("killed") / "w"
  with contextlib.redirect_stderr(io.StringIO()) as err:
    code, _ = start(workdir, 2, 2, hook=("kill=6", "process=1"))
  return code, err.getvalue(), workdir


def alone(workdir, text, *overrides):
  """Runs the tiny config in one process, this one, with eight devices."""
  cfg = config.override(config.load(f"{TINY}:text={text}"), [*overrides])
  noisy = mock.patch.object(objectives, "make_next_token", hooks.noisy)
  with noisy, jax.numpy_dtype_promotion("standard"):
    cfg.run(workdir)
  return workdir


@pytest.fixture(scope="module")
def single(text, tmp_path_factory):
  """The run of one process."""
  return alone(tmp_path_factory.mktemp("single") / "w", text, "samples.tokens=4")


def require_near(one, other, steps=STEPS):
  wanted, found = losses(one), losses(other)
  assert list(found) == list(wanted) == list(range(1, steps + 1))
  np.testing.assert_allclose(
    list(found.values()), list(wanted.values()), rtol=1e-5, atol=0
  )


def test_two_processes_have_the_losses_of_one(whole, single):
  require_near(single, whole)
  assert (whole / "samples.txt").exists()


def test_the_first_process_alone_writes(whole):
  lines = (whole / "metrics.jsonl").read_text().splitlines()
  assert len(lines) == STEPS + 2
  assert len(list((whole / "tensorboard").iterdir())) == 1


def test_a_killed_process_ends_the_others(killed):
  code, err, workdir = killed
  assert code == 75
  assert "process 1 was lost (killed by SIGKILL); the others were stopped" in err
  assert max(losses(workdir)) < 8


def test_the_job_resumes_exactly(start, whole, killed, copy):
  workdir = copy(killed[2], newest=4)
  assert start(workdir, 2, 2)[0] == 0
  step = f"checkpoints/{STEPS:08d}"
  got, wanted = (hooks.leaves_of(place / step) for place in (workdir, whole))
  assert got.keys() == wanted.keys()
  for name, leaf in wanted.items():
    np.testing.assert_array_equal(got[name], leaf, strict=True, err_msg=name)
  assert losses(workdir) == losses(whole)


def test_other_processes_and_meshes_go_on_from_its_checkpoint(
  start, single, killed, copy, text
):
  """Of two come four, over which tensors are split; asked to stop, they leave one."""
  workdir = copy(killed[2], newest=4)
  assert steps_in(workdir / "checkpoints") == [4]
  seldom = "checkpoints.every=99"
  term = ("term=6", "process=2")
  assert start(workdir, 4, 1, seldom, "mesh.tensor=2", hook=term)[0] == 0
  assert steps_in(workdir / "checkpoints") == [4, 8]
  alone(workdir, text, seldom, "mesh.data=2", "mesh.tensor=2")
  require_near(single, workdir)


def test_two_processes_make_one_reference(tmp_path, monkeypatch):
  """Into one folder, as on a shared disk; the losses are those of one process."""
  pairs = tmp_path / "pairs.jsonl"
  rows = [
    {"prompt": f"Say {i}:", "chosen": "yes " * (1 + i % 5), "rejected": f"no {i}"}
    for i in range(40)
  ]
  pairs.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
  spec = f"{HOOKS.with_name('tiny_pairs.py')}:pairs={pairs}"
  one = config.load(spec).run(tmp_path / "one").workdir
  for name in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION"):
    monkeypatch.delenv(name, raising=False)
  words = [
    sys.executable, "-m", "jaxlm", f"--config={spec}", f"--workdir={tmp_path / 'two'}",
    f"--config.data.cache={tmp_path / 'rows'}",
  ]  # fmt: skip
  assert local.run(words, 2, 2) == 0
  require_near(one, tmp_path / "two", steps=4)
  held_out = [
    {
      row["step"]: row["held_out/margin"]
      for row in read(place)
      if "held_out/margin" in row
    }
    for place in (one, tmp_path / "two")
  ]
  assert held_out[0].keys() == {2, 4}
  for step, margin in held_out[0].items():
    assert held_out[1][step] == pytest.approx(margin, abs=1e-5)
  assert len(list((tmp_path / "rows").glob("*/reference-*.json"))) == 1
  assert not list((tmp_path / "rows").glob("*/*.*.*.????????.npy"))


def test_what_one_process_sees_otherwise_is_told(start, whole, tmp_path, capfd):
  copy = tmp_path / "w"
  shutil.copytree(whole, copy)
  code, _ = start(copy, 2, 1, "seed=5")
  assert code == 2
  out = capfd.readouterr().out
  assert "error: --workdir=" in out
  assert "seed: 0 -> 5" in out
  assert "[1] error: process 1: --workdir: failed on process 0" in out
