"""Distillation in the one loop: beside the student, and stored beside the data."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxlm.errors import InputError
from jaxlm.models.decoder import Decoder
from jaxlm.models.spec import Precision
from jaxlm.posttrain.distill import Distill
from jaxlm.posttrain.divergence import Divergence
from jaxlm.runs import plan
from jaxlm.runs.teacher import open_teacher
from jaxlm.sharding.mesh import Mesh, make_mesh
from jaxlm.sharding.rules import Layout
from jaxlm.training.metrics import TIMES
from runs import hooks

STEPS = 12
MODES = {"beside": {}, "stored": {"top_k": 8}}


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
  """The workdir of a run that learned a little."""
  workdir = tmp_path_factory.mktemp("teacher") / "w"
  with jax.numpy_dtype_promotion("standard"):
    tiny("steps=40", "evaluate_every=40").run(workdir)
  return str(workdir)


@pytest.fixture(scope="module")
def distil(tiny, teacher, tmp_path_factory):
  """Makes a student's run; rows are shared."""
  cache = str(tmp_path_factory.mktemp("rows"))

  def make(mode, *overrides, **fields):
    rate = "optimizer.lr=Constant(peak=0.01)"  # which does not depend on steps
    run = tiny(f"data.cache={cache}", rate, *overrides)
    narrow = dataclasses.replace(run.model, dim=16)
    objective = Distill(teacher=teacher, **MODES[mode] | fields)
    return dataclasses.replace(run, model=narrow, objective=objective, ema=None)

  return make


@pytest.fixture(scope="module", params=MODES)
def whole(request, distil, tmp_path_factory):
  """(mode, the run without interruption)."""
  workdir = tmp_path_factory.mktemp("whole") / "w"
  with jax.numpy_dtype_promotion("standard"):
    return request.param, distil(request.param).run(workdir)


def losses(result):
  rows = [row for row in result.rows if "loss" in row]
  return [{n: v for n, v in row.items() if n not in TIMES} for row in rows]


def test_the_student_comes_nearer(whole):
  _, result = whole
  found = [row["divergence"] for row in losses(result)]
  assert found[-1] < 0.75 * found[0]
  scores = [row for row in result.rows if "held_out/divergence" in row]
  assert [row["step"] for row in scores] == [6, 12]
  assert scores[1]["held_out/nll"] < scores[0]["held_out/nll"]
  assert scores[1]["held_out/divergence"] < scores[0]["held_out/divergence"]


def test_what_is_stored_bounds_the_whole_from_below(distil, tmp_path):
  """The first loss, of the same weights on the same rows."""
  first = {}
  for mode in MODES:
    run = distil(mode, "steps=1", "evaluate_every=1")
    first[mode] = losses(run.run(tmp_path / mode))[0]["divergence"]
  assert 0.3 * first["beside"] < first["stored"] < first["beside"]
  run = distil("stored", "steps=1", "evaluate_every=1", top_k=264)
  every = losses(run.run(tmp_path / "all"))[0]["divergence"]
  assert every == pytest.approx(first["beside"], rel=1e-5)


def test_resume_is_exact_to_the_bit(whole, distil, tmp_path, capsys):
  mode, wanted = whole
  distil(mode, "steps=4").run(tmp_path / "w")
  capsys.readouterr()
  again = distil(mode).run(tmp_path / "w")
  assert ("teacher: log-probabilities found" in capsys.readouterr().out) == (
    mode == "stored"
  )
  assert again.step == STEPS
  ours = hooks.leaves_of(tmp_path / "w" / "checkpoints" / f"{STEPS:08d}")
  theirs = hooks.leaves_of(wanted.workdir / "checkpoints" / f"{STEPS:08d}")
  # What trains, and nothing of the teacher.
  assert ours.keys() == theirs.keys()
  assert not any(leaf.shape[-1:] == (32,) for leaf in ours.values() if leaf.ndim > 1)
  for name, leaf in theirs.items():
    np.testing.assert_array_equal(ours[name], leaf, strict=True, err_msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_meshes_and_micro_batches_change_nothing(mode, distil, tmp_path):
  one = distil(mode, "steps=3").run(tmp_path / "one")
  words = ("steps=3", "mesh.fsdp=2", "mesh.tensor=2", "mesh.context=2", "accumulate=2")
  many = distil(mode, *words).run(tmp_path / "many")
  assert len(losses(one)) == 3
  for ours, theirs in zip(losses(many), losses(one), strict=True):
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-4)


def test_other_temperatures_are_stored_apart(distil, tmp_path, capsys):
  distil("stored", "steps=1").run(tmp_path / "a")
  hot = Divergence(temperature=2.0)
  distil("stored", "steps=1", divergence=hot).run(tmp_path / "b")
  assert "teacher: scoring" in capsys.readouterr().out


def test_a_teacher_that_does_not_fit_is_refused(distil, tmp_path):
  run = distil("beside")
  with pytest.raises(InputError, match=r"objective.teacher: .*nowhere does not exist"):
    dataclasses.replace(run, objective=Distill(teacher="nowhere")).run(tmp_path / "w")
  other = dataclasses.replace(run.model, vocab=300)
  layout = Layout(make_mesh(Mesh(), jax.devices()[:1]))
  with pytest.raises(InputError, match=r"has 264 ids and the student .* 300"):
    open_teacher(run.objective, Decoder(other, Precision(), layout), 32)
  most = dataclasses.replace(run.objective, top_k=265)
  with pytest.raises(InputError, match=r"objective.top_k: 265 of 264 ids"):
    open_teacher(most, Decoder(run.model, Precision(), layout), 32)


def test_the_plan_counts_the_teacher(distil):
  (target,) = plan.launch.targets("h100:8")
  told = plan.report(plan.prepare(distil("beside"), target))
  decoder = told.predicted.frozen * 8
  table = 264 * 32 * 4
  assert table < decoder < 20 * table
  assert any(line.startswith("  frozen ") for line in told.lines)
  assert "  left out of it: the teacher's forward pass and its activations" in (
    told.lines
  )
  assert plan.report(plan.prepare(distil("stored"), target)).predicted.frozen == 0


@pytest.mark.parametrize("mode", MODES)
def test_another_teacher_on_resuming_is_refused(mode, distil, tmp_path):
  distil(mode, "steps=1").run(tmp_path / "w")
  record = tmp_path / "w" / "teacher.json"
  record.write_text(json.dumps({"weights": "0" * 32}))
  with pytest.raises(InputError, match=r"this run's teacher was the weights 0000"):
    distil(mode, "steps=2").run(tmp_path / "w")
  record.unlink()
  with pytest.raises(InputError, match=r"teacher.json is gone"):
    distil(mode, "steps=2").run(tmp_path / "w")
