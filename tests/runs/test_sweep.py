"""A sweep from the outside: every run once, whatever interrupts it."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest

from jaxlm import config
from jaxlm.errors import InputError
from jaxlm.launch import local
from jaxlm.models import count
from jaxlm.runs import sweep, together, train
from jaxlm.scaling.store import Store
from jaxlm.training.checkpoints import Checkpoints
from runs import tiny_sweep

HERE = pathlib.Path(__file__)
CONFIG = HERE.with_name("tiny_sweep.py")


@pytest.fixture(scope="module")
def make(text, cache):
  return config.load(f"{CONFIG}:text={text},cache={cache}")


@pytest.fixture(scope="module")
def done(make, tmp_path_factory):
  """A sweep that ended: its workdir and rows."""
  workdir = tmp_path_factory.mktemp("sweep") / "x"
  with jax.numpy_dtype_promotion("standard"):
    return workdir, make.run(workdir)


def test_every_run_has_a_row(make, done):
  workdir, rows = done
  assert [row["key"] for row in rows] == [sweep.key_of(run) for run in make.runs]
  assert len(list((workdir / "rows").iterdir())) == len(make.runs) == 8
  for run, row in zip(make.runs, rows, strict=True):
    tokens = run.steps * 8 * 32
    assert (row["seed"], row["peak"], row["steps"]) == (
      run.seed, run.optimizer.lr.peak, run.steps,
    )  # fmt: skip
    assert row["tokens"] == tokens
    assert row["parameters"] == count.parameters(run.model).total
    assert row["flops"]["all"] == 6 * row["parameters"] * tokens
    exact = count.training_flops(run.model, 32)
    assert row["flops"]["causal"] == exact.causal * tokens
    assert row["flops"]["full"] == exact.full * tokens
    assert row["together"] == 4
    assert row["curve"][-1][0] == tokens
    assert 0 < row["loss"] < row["curve"][0][1]
    assert row["versions"].keys() >= {"jaxlm", "jax", "python"}
    assert row["seconds"] > 0


def test_started_again_it_does_nothing(make, done, monkeypatch):
  workdir, rows = done
  monkeypatch.setattr(together, "Program", None)
  assert make.run(workdir) == rows


def test_what_changes_no_number_changes_no_key(make):
  run = make.runs[0]
  same = [
    dataclasses.replace(run, checkpoints=Checkpoints(every=3), log_every=7),
    dataclasses.replace(run, data=dataclasses.replace(run.data, cache="/x", threads=1)),
    dataclasses.replace(run, objective=dataclasses.replace(run.objective, chunk=3)),
  ]
  other = [
    dataclasses.replace(run, seed=5),
    dataclasses.replace(run, steps=run.steps + 1),
    dataclasses.replace(run, init_scale=((".*", 2.0),)),
    dataclasses.replace(run, data=dataclasses.replace(run.data, batch=16)),
    dataclasses.replace(run, objective=dataclasses.replace(run.objective, z_loss=1e-4)),
  ]
  assert {sweep.key_of(each) for each in same} == {sweep.key_of(run)}
  assert len({sweep.key_of(each) for each in [run, *other]}) == 6


def test_alone_gives_the_rows_of_together(make, done, tmp_path):
  runs = make.runs[:2]
  rows = sweep.Sweep(runs=runs, how="alone").run(tmp_path)
  for mine, other in zip(rows, done[1], strict=False):
    assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert mine["together"] == 1
    same = ("key", "tokens", "flops", "corpus", "peak", "seed", "parameters")
    assert {n: mine[n] for n in same} == {n: other[n] for n in same}
  assert {place.name for place in (tmp_path / "runs").iterdir()} == {
    sweep.key_of(run) for run in runs
  }


KILLED = """
import os, signal
from jaxlm.__main__ import main
from jaxlm.scaling.store import Store
add = Store.add
def killed(self, key, row):
  if len(self.rows()) == 2:
    os.kill(os.getpid(), signal.SIGKILL)
  add(self, key, row)
Store.add = killed
main()
"""
"""A program that is killed when its third run has been trained, and has no row yet."""


def test_a_sweep_that_is_killed_goes_on(text, cache, make, tmp_path):
  """No finished run is repeated, and none is lost."""
  command = [
    sys.executable, "-c", KILLED, f"--config={CONFIG}:text={text},cache={cache}",
    f"--workdir={tmp_path / 'x'}", "--config.most=1",
  ]  # fmt: skip
  env = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
  env["JAX_NUMPY_DTYPE_PROMOTION"] = "standard"
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
  rows = tmp_path / "x/rows"
  before = {place.name: place.read_bytes() for place in rows.iterdir()}
  assert len(before) == 2
  found = dataclasses.replace(make, most=1).run(tmp_path / "x")
  assert len(found) == 8
  after = {place.name: place.read_bytes() for place in rows.iterdir()}
  assert len(after) == 8
  assert {name: after[name] for name in before} == before


def test_several_processes_take_each_run_together(
  text, cache, done, tmp_path, monkeypatch
):
  """A run that diverges, and the one after it."""
  for name in ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION"):
    monkeypatch.delenv(name)
  monkeypatch.setenv("PYTHONPATH", str(HERE.parents[1]))
  spec = f"{CONFIG}:text={text},cache={cache},diverging=true"
  command = [sys.executable, "-m", "jaxlm", f"--config={spec}", f"--workdir={tmp_path}"]
  assert local.run(command, 2, 1) == 0
  wild, good = (sweep.key_of(run) for run in config.load(spec).runs)
  rows, (wanted,) = Store(tmp_path / "rows"), [r for r in done[1] if r["key"] == good]
  assert rows.row(wild)["loss"] is None
  assert rows.row(good)["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_runs_that_another_program_has_are_left_to_it(make, tmp_path, monkeypatch):
  """Whatever groups the other makes."""
  monkeypatch.setattr(sweep, "PATIENCE", 0)
  done = []
  monkeypatch.setattr(sweep.Doing, "do", lambda self, runs: done.append(runs))
  one, other = (sweep.Doing(make, tmp_path) for _ in range(2))
  with contextlib.ExitStack() as claims:
    index, mine = one._choose(claims)
    assert (index, len(mine)) == (0, 4)
    assert other.next()
    assert done == [make.groups()[1]]
    again = sweep.Doing(dataclasses.replace(make, most=3), tmp_path)
    assert again.next()
    assert [len(runs) for runs in done] == [4, 3]
    done.clear()
    busy = sweep.Doing(dataclasses.replace(make, runs=make.runs[:4]), tmp_path)
    assert busy.next()  # it waits
    assert done == []
  assert other.next()
  assert done == [make.groups()[0]]


def test_a_signal_ends_the_sweep(make, tmp_path, monkeypatch):
  begun = []

  def stopped(self, workdir):
    begun.append(workdir)
    return train.Result(workdir, 3, "SIGTERM", None, None, None, [])

  monkeypatch.setattr(train.Train, "run", stopped)
  rows = dataclasses.replace(make, how="alone").run(tmp_path)
  assert len(begun) == 1
  assert rows == []


def test_a_score_that_is_not_finite_is_a_divergence(make, tmp_path, monkeypatch):
  bad = {"held_out/nll": float("nan"), "held_out/bits_per_byte": 1.0}
  monkeypatch.setattr(together.Program, "scores", lambda *_: bad)
  few = dataclasses.replace(make, runs=make.runs[:1])
  (row,) = few.run(tmp_path)
  assert (row["loss"], row["diverged_at"]) == (None, 6)


def test_what_a_program_chose_is_told(make, tmp_path, capsys):
  dataclasses.replace(make, runs=make.runs[:1]).run(tmp_path)
  said = capsys.readouterr().out
  for words in ("decay x", "attention:", "remat: none", "compiled in", "documents"):
    assert words in said


def test_rows_of_other_text_are_refused(make, done, tmp_path):
  row = json.loads(json.dumps(done[1][0]))
  Store(tmp_path / "rows").add(row["key"], row | {"corpus": "other"})
  with pytest.raises(InputError, match=r"runs\.0\.data\.sources: its row .* other"):
    make.run(tmp_path)


def test_a_run_that_diverges_has_a_row_that_says_so(text, cache, tmp_path):
  wild = tiny_sweep.wild(text, cache)
  (row,) = sweep.Sweep(runs=(wild,), how="alone").run(tmp_path)
  assert row["loss"] is None
  assert row["bits_per_byte"] is None
  assert 1 < row["diverged_at"] <= 6


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"runs": ()}, "runs: none"),
    ({"how": "alone", "held": 0.0}, "runs.0: objective NextToken, data.held_out 0.0"),
    ({"most": 0}, "most: 0 is under 1"),
    ({"dispatch": 0}, "dispatch: 0 is under 1"),
  ],
)
def test_bad_sweeps(make, change, words):
  change = dict(change)
  if (held := change.pop("held", None)) is not None:
    run = make.runs[0]
    data = dataclasses.replace(run.data, held_out=held)
    change["runs"] = (dataclasses.replace(run, data=data),)
  with pytest.raises(InputError, match=words):
    dataclasses.replace(make, **change)


def test_a_run_that_stands_twice_is_refused(make):
  twice = (*make.runs, dataclasses.replace(make.runs[3], log_every=9))
  with pytest.raises(InputError, match=r"runs: \[3, 8\] are the same run"):
    dataclasses.replace(make, runs=twice)


def test_a_run_that_cannot_be_one_of_several_is_named(make):
  wrong = dataclasses.replace(make.runs[2], initial="model")
  with pytest.raises(InputError, match=r"runs\.1\.initial: model"):
    dataclasses.replace(make, runs=(make.runs[0], wrong))
